"""The page of a comparison: its content and figures, escaping of hostile text, and damaged files."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.browser import open_page
from helpers.comparison_results import CARD, CONDITION, RESULTS, ROW, STUDY, TIMINGS, changed, write

from omninorm.errors import RunError
from omninorm.report.comparison import Comparison, read_comparison, write_comparison_page, write_markdown
from omninorm.report.comparison.figures import claim_figure, study_figure
from omninorm.report.comparison.markdown import render as render_markdown
from omninorm.report.comparison.page import kind, render

NASTY = "</style><script>document.title='owned'</script><img src=x onerror=alert(1)>&\u202e$x$ | `a`"


def images(html: str) -> list[str]:
    return [base64.b64decode(each).decode() for each in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", html)]


def test_the_page_has_claims_in_the_plans_order_and_all_studies(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path))
    html = render(comparison)
    assert [card.id for card in comparison.claims] == ["C2", "C3"]
    assert comparison.seconds == 120.0
    for said in (
        "No difference.",
        "omninorm compare --preset C3",
        "0.4 … 0.6",
        "2 CPU-minutes",
        "layernorm pre",
        "1 of 2 diverged",
    ):
        assert said in html
    assert len(images(html)) == 3  # two claims and a study


def test_the_verdicts_of_a_study_are_visible_above_its_figure_and_numbers(tmp_path: Path) -> None:
    study = render(read_comparison(write(tmp_path))).split('id="studies"')[1]
    verdict, *_ = read_comparison(tmp_path).studies[0].comparisons
    item = f"<li>{verdict.label}, {verdict.depth} blocks: <b>{verdict.verdict}</b></li>"
    assert 0 < study.index("Compared with rmsnorm pre:") < study.index(item) < study.index("<img")
    assert study.index("<img") < study.index("<details>")


def test_a_long_list_of_verdicts_is_cut(tmp_path: Path) -> None:
    results = changed("plan", "title", to="Norms")
    comparisons = results["studies"][0]["comparisons"]
    comparisons *= 15
    study = render(read_comparison(write(tmp_path, results))).split('id="studies"')[1]
    assert study.count("<li>") == 13
    assert "<li>3 more in the table below</li>" in study


def test_a_browser_opens_the_page_without_console_output(tmp_path: Path) -> None:
    shown = open_page(render(read_comparison(write(tmp_path / "run"))), tmp_path)
    assert shown.console == []
    assert shown.title == "Norms"


@pytest.fixture
def hostile(tmp_path: Path) -> Comparison:
    """Every text of the results holds markup, a script and control characters."""
    results = changed("plan", "title", to=NASTY)
    results["claims"] = [{name: NASTY if isinstance(value, str) else value for name, value in CARD.items()}]
    results["claims"][0]["conditions"] = [{**CONDITION, "label": NASTY, "unit": NASTY}]
    results["studies"][0]["name"] = results["studies"][0]["configurations"][0]["label"] = NASTY
    results["text"]["name"] = NASTY
    results["failures"] = {NASTY: NASTY}
    return read_comparison(write(tmp_path / "run", results))


def test_a_browser_runs_no_script_of_hostile_text(hostile: Comparison, tmp_path: Path) -> None:
    shown = open_page(render(hostile), tmp_path)
    assert shown.console == []
    assert shown.title != "owned"


def test_hostile_text_is_escaped(hostile: Comparison, tmp_path: Path) -> None:
    html = render(hostile)
    assert "<script" not in html
    assert "<img src=x" not in html
    for svg in images(html):
        assert "<script" not in svg
        ElementTree.fromstring(svg)
    text = write_markdown(hostile, tmp_path / "page.md").read_text()
    for line in text.splitlines():
        assert "<script" not in line.partition("`")[0], "only within code, where nothing is markup"
        assert "<img" not in line.partition("`")[0]


@pytest.mark.parametrize(
    ("verdict", "sort"),
    [
        ("holds", "holds"),
        ("holds in part (2 of 5 conditions)", "partly"),
        ("holds only when: a", "partly"),
        ("does not hold here", "fails"),
        ("not enough evidence (about 3 more seeds needed)", "unclear"),
    ],
)
def test_every_verdict_has_a_mark(verdict: str, sort: str) -> None:
    assert kind(verdict) == sort


def test_logarithms_are_displayed_as_their_exponentials(tmp_path: Path) -> None:
    condition = {**CONDITION, "mean": 0.6931471805599453, "low": 0.0, "high": None, "scale": "log", "threshold": 0.0}
    html = render(read_comparison(write(tmp_path, changed("claims", 0, "conditions", to=[condition]))))
    assert "<td>2</td>" in html
    assert "<td>&lt; 1</td>" in html


@pytest.mark.parametrize("protocol", ["train", "init", "ramp"])
def test_the_protocol_decides_the_figure_of_a_study(tmp_path: Path, protocol: str) -> None:
    row = {**ROW, "stream_rms": [1.0, 2.0, None], "grad_norms": [0.1, 0.0, 0.3], "by_rate": [[0.001, 3.5], [0.01, 3.0]]}
    results = changed("studies", 0, to={**STUDY, "protocol": protocol, "configurations": [row]})
    study = read_comparison(write(tmp_path, results)).studies[0]
    svg = study_figure(study)
    assert svg is not None
    assert svg == study_figure(study), "the same results give the same figure"
    assert {"train": "learning rate", "init": "RMS of the residual stream", "ramp": "largest tolerable"}[
        protocol
    ] in svg.decode()


def test_an_extreme_loss_does_not_scale_the_axis(tmp_path: Path) -> None:
    """Axes end near the 8 bits of a uniform guess."""
    wild = {**ROW, "label": "wild", "curve": [[10, 5000.0], [20, 8.0], [30, 4.0]]}
    study = read_comparison(write(tmp_path, changed("studies", 0, "configurations", to=[ROW, wild]))).studies[0]
    ticks = re.findall(r">(-?\d+(?:\.\d+)?)<", study_figure(study).decode())
    assert ticks
    assert all(abs(float(tick)) <= 40 for tick in ticks)


def test_a_study_without_values_has_no_figure(tmp_path: Path) -> None:
    empty = {**ROW, "values": {}, "lost": [], "curve": []}
    results = changed("studies", 0, "configurations", to=[empty])
    results["claims"][0]["conditions"] = [{**CONDITION, "mean": None, "low": None, "high": None}]
    comparison = read_comparison(write(tmp_path, results, {**TIMINGS, "claims": [], "cells": {}}))
    assert study_figure(comparison.studies[0]) is None
    assert claim_figure(comparison.claims[0]) is None
    assert images(render(comparison)) == []
    assert comparison.seconds is None


def test_markdown_has_the_claims_studies_and_figures(tmp_path: Path) -> None:
    page = write_markdown(read_comparison(write(tmp_path / "run")), tmp_path / "docs" / "claims.md")
    text = page.read_text()
    for said in (
        "# Norms",
        "**✓ Holds.** No difference.",
        "claims/C3.svg",
        "claims/study-norms.svg",
        "| rmsnorm pre | 4 |",
    ):
        assert said in text
    assert {path.name for path in (tmp_path / "docs" / "claims").iterdir()} == {"C2.svg", "C3.svg", "study-norms.svg"}


@pytest.mark.parametrize(
    ("results", "place"),
    [
        (changed("format", to=1), "must have format 2"),
        (changed("claims", 0, "conditions", 0, "mean", to="high"), "claims.0.conditions.0.mean"),
        (changed("claims", 0, "conditions", 0, "mean", to=math.nan), "claims.0.conditions.0.mean"),
        (changed("claims", 0, "conditions", 0, "more", to=10**400), "claims.0.conditions.0.more"),
        (changed("studies", 0, "configurations", to=3), "studies.0.configurations"),
        (changed("studies", 0, "configurations", 0, "values", to={"0": 1e300}), "studies.0.configurations.0.values.0"),
        (changed("studies", 0, "configurations", 0, "outcomes", to={"0": 3}), "configurations.0.outcomes.0"),
        (changed("plan", to=3), "plan"),
        ({}, "must have format 2"),
        ([], "must have format 2"),  # type: ignore[list-item]
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path: Path, results: dict, place: str) -> None:
    with pytest.raises(RunError) as caught:
        read_comparison(write(tmp_path, results))
    assert place in caught.value.invariant
    assert str(tmp_path / "results.json") in caught.value.invariant


def test_times_beyond_a_float_are_refused(tmp_path: Path) -> None:
    results = changed("plan", "claims", to=3)
    assert read_comparison(write(tmp_path, results)).claims
    with pytest.raises(RunError, match="seconds"):
        read_comparison(write(tmp_path, RESULTS, {**TIMINGS, "cells": {"a": {"seconds": 10**400}}}))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_not_json_are_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(RunError, match=r"results\.json is not valid JSON"):
        read_comparison(tmp_path)


def test_an_existing_page_is_replaced(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path))
    (tmp_path / "page.html").write_text("before")
    page = write_comparison_page(comparison, tmp_path / "page.html")
    assert page.read_text().startswith("<!doctype html>")
    with pytest.raises(RunError):
        write_comparison_page(comparison, tmp_path / "results.json" / "page.html")
    assert RESULTS["format"] == 2


UNCLEAR = {**CONDITION, "outcome": "unclear", "more": 998}


def test_an_absurd_number_of_seeds_is_given_in_words(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path, changed("claims", 0, "conditions", to=[UNCLEAR])))
    for page in (render(comparison), render_markdown(comparison, "figures", [])):
        assert "not enough evidence (more than 100 seeds needed)" in page
        assert "998" not in page


@pytest.mark.parametrize(
    ("outcomes", "missing", "words"),
    [
        ({"0": "learned", "1": "learned"}, 0, "2 learned"),
        ({"0": "learned", "1": "diverged"}, 0, "1 learned, 1 diverged"),
        ({"0": "stagnated", "1": "diverged"}, 2, "1 stagnated, 1 diverged, 2 failed"),
        ({}, 0, "1 of 2 diverged"),
    ],
)
def test_outcomes_are_counted_in_the_tables(tmp_path: Path, outcomes: dict, missing: int, words: str) -> None:
    row = {**ROW, "outcomes": outcomes, "missing": missing}
    comparison = read_comparison(write(tmp_path, changed("studies", 0, "configurations", 0, to=row)))
    assert f"<td>{words}</td>" in render(comparison)
    assert f"| {words} |" in render_markdown(comparison, "figures", [])
