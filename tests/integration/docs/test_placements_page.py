"""The tables of docs/placements.md match the results in docs/placements/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from omninorm.config import PLACEMENTS

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "placements.md").read_text(encoding="utf-8").replace("−", "-")
RECENT, OLDER = PAGE.split("## What we measured")


def studies(name: str) -> list[dict[str, Any]]:
    return json.loads((DOCS / "placements" / name).read_text(encoding="utf-8"))["studies"]  # type: ignore[no-any-return]


def rows(text: str) -> dict[str, tuple[float, str, str]]:
    """The mean, difference and verdict of each placement in a table."""
    found = re.findall(r"^\| `(\w+)` \| (\d\.\d{3}) \| (.*?) ?\| (.*?) \|$", text, re.MULTILINE)
    return {name: (float(mean), difference, verdict) for name, mean, difference, verdict in found}


def placement(row: dict[str, Any]) -> str:
    return row["label"].split()[1]  # type: ignore[no-any-return]


def numbers(difference: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]\d\.\d+", difference)]


(ALL,), (RULES, MUON) = studies("results.json"), studies("rules.json")
TABLES = [pytest.param(RULES, rows(RECENT), id="recent rules"), pytest.param(ALL, rows(OLDER), id="all placements")]


def test_every_placement_is_named() -> None:
    assert all(f"| `{name}` |" in PAGE for name in PLACEMENTS)


@pytest.mark.parametrize(("study", "table"), TABLES)
def test_table_has_the_means_of_all_measured_placements(study: dict[str, Any], table: dict[str, Any]) -> None:
    assert table.keys() == {placement(each) for each in study["configurations"]}
    for each in study["configurations"]:
        values = each["values"].values()
        assert table[placement(each)][0] == pytest.approx(sum(values) / len(values), abs=6e-4), each["label"]


@pytest.mark.parametrize(("study", "table"), TABLES)
def test_table_has_the_differences_and_verdicts_of_the_results(study: dict[str, Any], table: dict[str, Any]) -> None:
    for each in study["comparisons"]:
        _, difference, verdict = table[placement(each)]
        assert numbers(difference) == pytest.approx([each["mean"], each["low"], each["high"]], abs=6e-4), each["label"]
        assert verdict == each["verdict"]


def test_differences_with_muon_are_those_of_the_results() -> None:
    (text,) = re.findall(r"^With Muon.*?\n\n", RECENT, re.MULTILINE | re.DOTALL)
    assert all(each["verdict"].startswith("not enough evidence") for each in MUON["comparisons"])
    found = {name: numbers(rest) for name, rest in re.findall(r"`(\w+)`\s+([-+][\d.]+\s+\([^)]*\))", text)}
    assert found.keys() == {placement(each) for each in MUON["comparisons"]}
    for each in MUON["comparisons"]:
        assert found[placement(each)] == pytest.approx([each["mean"], each["low"], each["high"]], abs=6e-4)
    (baseline,) = [each for each in MUON["configurations"] if placement(each) == "pre"]
    assert f"({sum(baseline['values'].values()) / len(baseline['values']):.3f})" in text
