"""The page of a comparison: everything is on it, nothing of it runs, and damaged files are refused in words."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.browser import open_page
from helpers.comparison_results import CARD, CONDITION, RESULTS, ROW, STUDY, TIMINGS, changed, write

from omninorm.errors import RunError
from omninorm.report.comparison import read_comparison, write_comparison_page, write_markdown
from omninorm.report.comparison.figures import claim_figure, study_figure
from omninorm.report.comparison.page import kind, render

NASTY = "</style><script>document.title='owned'</script><img src=x onerror=alert(1)>&\u202e$x$ | `a`"


def images(html: str) -> list[str]:
    return [base64.b64decode(each).decode() for each in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", html)]


def test_the_page_has_claims_and_studies_in_the_plans_order(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path))
    html = render(comparison)
    assert [card.id for card in comparison.claims] == ["C2", "C3"]
    assert comparison.seconds == 120.0
    for said in (
        "No difference.",
        "omninorm compare --preset C3",
        "0.4 … 0.6",
        "2.0 core minutes",
        "layernorm pre",
        "1/2",
    ):
        assert said in html
    assert len(images(html)) == 3  # two claims and a study


def test_the_page_opens_in_a_browser_without_a_word(tmp_path: Path) -> None:
    shown = open_page(render(read_comparison(write(tmp_path / "run"))), tmp_path)
    assert shown.console == []
    assert shown.title == "Norms"


def test_nothing_of_a_file_runs(tmp_path: Path) -> None:
    results = changed("plan", "title", to=NASTY)
    results["claims"] = [{name: NASTY if isinstance(value, str) else value for name, value in CARD.items()}]
    results["claims"][0]["conditions"] = [{**CONDITION, "label": NASTY, "unit": NASTY}]
    results["studies"][0]["name"] = results["studies"][0]["configurations"][0]["label"] = NASTY
    results["text"]["name"] = NASTY
    results["failures"] = {NASTY: NASTY}
    comparison = read_comparison(write(tmp_path / "run", results))
    html = render(comparison)
    assert "<script" not in html
    assert "<img src=x" not in html
    shown = open_page(html, tmp_path)
    assert shown.console == []
    assert shown.title != "owned"
    for svg in images(html):
        assert "<script" not in svg
        ElementTree.fromstring(svg)
    text = write_markdown(comparison, tmp_path / "page.md").read_text()
    for line in text.splitlines():
        assert "<script" not in line.partition("`")[0], "only within code, where nothing is markup"
        assert "<img" not in line.partition("`")[0]


@pytest.mark.parametrize(
    ("verdict", "sort"),
    [
        ("holds", "holds"),
        ("holds only when: a", "partly"),
        ("does not hold here", "fails"),
        ("not enough evidence: needs about 3 more seeds", "unclear"),
    ],
)
def test_verdicts_have_marks(verdict: str, sort: str) -> None:
    assert kind(verdict) == sort


def test_logarithms_are_shown_as_what_they_are_of(tmp_path: Path) -> None:
    condition = {**CONDITION, "mean": 0.6931471805599453, "low": 0.0, "high": None, "scale": "log", "threshold": 0.0}
    html = render(read_comparison(write(tmp_path, changed("claims", 0, "conditions", to=[condition]))))
    assert "<td>2</td>" in html
    assert "&lt; 1 bits per byte" in html


@pytest.mark.parametrize("protocol", ["train", "init", "ramp"])
def test_a_study_is_drawn_by_its_protocol(tmp_path: Path, protocol: str) -> None:
    row = {**ROW, "stream_rms": [1.0, 2.0, None], "grad_norms": [0.1, 0.0, 0.3], "by_rate": [[0.001, 3.5], [0.01, 3.0]]}
    results = changed("studies", 0, to={**STUDY, "protocol": protocol, "configurations": [row]})
    study = read_comparison(write(tmp_path, results)).studies[0]
    svg = study_figure(study)
    assert svg is not None
    assert svg == study_figure(study), "the same results give the same figure"
    assert {"train": "learning rate", "init": "RMS of the stream", "ramp": "largest tolerable"}[
        protocol
    ] in svg.decode()


def test_a_loss_beyond_all_bounds_does_not_flatten_the_others(tmp_path: Path) -> None:
    """Axes end near the 8 bits of a uniform guess."""
    wild = {**ROW, "label": "wild", "curve": [[10, 5000.0], [20, 8.0], [30, 4.0]]}
    study = read_comparison(write(tmp_path, changed("studies", 0, "configurations", to=[ROW, wild]))).studies[0]
    ticks = re.findall(r">(-?\d+(?:\.\d+)?)<", study_figure(study).decode())
    assert ticks
    assert all(abs(float(tick)) <= 40 for tick in ticks)


def test_where_there_is_nothing_to_draw_nothing_is_drawn(tmp_path: Path) -> None:
    empty = {**ROW, "values": {}, "lost": [], "curve": []}
    results = changed("studies", 0, "configurations", to=[empty])
    results["claims"][0]["conditions"] = [{**CONDITION, "mean": None, "low": None, "high": None}]
    comparison = read_comparison(write(tmp_path, results, {**TIMINGS, "claims": [], "cells": {}}))
    assert study_figure(comparison.studies[0]) is None
    assert claim_figure(comparison.claims[0]) is None
    assert images(render(comparison)) == []
    assert comparison.seconds is None


def test_markdown_has_the_same(tmp_path: Path) -> None:
    page = write_markdown(read_comparison(write(tmp_path / "run")), tmp_path / "docs" / "claims.md")
    text = page.read_text()
    for said in (
        "# Norms",
        "**✓ holds.** No difference.",
        "claims/C3.svg",
        "claims/study-norms.svg",
        "| rmsnorm pre | 4 |",
    ):
        assert said in text
    assert {path.name for path in (tmp_path / "docs" / "claims").iterdir()} == {"C2.svg", "C3.svg", "study-norms.svg"}


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (changed("format", to=1), "results have format 2, got 1"),
        (changed("claims", 0, "conditions", 0, "mean", to="high"), "claims.0.conditions.0.mean"),
        (changed("studies", 0, "configurations", to=3), "studies.0.configurations"),
        (changed("plan", to=3), "plan in"),
        ({}, "results have format 2"),
        ([], "results have format 2"),  # type: ignore[list-item]
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, results: dict, said: str) -> None:
    with pytest.raises(RunError, match=re.escape(said)):
        read_comparison(write(tmp_path, results))


def test_claims_that_are_no_list_and_times_beyond_a_float(tmp_path: Path) -> None:
    results = changed("plan", "claims", to=3)
    assert read_comparison(write(tmp_path, results)).claims
    with pytest.raises(RunError, match="seconds"):
        read_comparison(write(tmp_path, RESULTS, {**TIMINGS, "cells": {"a": {"seconds": 10**400}}}))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(RunError, match="readable JSON"):
        read_comparison(tmp_path)


def test_a_page_is_replaced_in_one_go(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path))
    (tmp_path / "page.html").write_text("before")
    page = write_comparison_page(comparison, tmp_path / "page.html")
    assert page.read_text().startswith("<!doctype html>")
    with pytest.raises(RunError):
        write_comparison_page(comparison, tmp_path / "results.json" / "page.html")
    assert RESULTS["format"] == 2
