"""The table of docs/placements.md matches docs/placements/results.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from omninorm.config import PLACEMENTS

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "placements.md").read_text(encoding="utf-8").replace("−", "-")
(STUDY,) = json.loads((DOCS / "placements" / "results.json").read_text(encoding="utf-8"))["studies"]
ROWS = {
    name: (float(mean), difference, verdict)
    for name, mean, difference, verdict in re.findall(
        r"^\| `(\w+)` \| (\d\.\d{3}) \| (.*?) ?\| (.*?) \|$", PAGE, re.MULTILINE
    )
}


def test_every_placement_is_named_and_every_measured_one_has_a_row() -> None:
    assert all(f"| `{name}` |" in PAGE for name in PLACEMENTS)
    assert set(ROWS) == {configuration["label"].split()[1] for configuration in STUDY["configurations"]}


@pytest.mark.parametrize("configuration", STUDY["configurations"], ids=lambda row: row["label"])
def test_a_mean_matches_the_results(configuration: dict) -> None:
    values = configuration["values"].values()
    mean, _, _ = ROWS[configuration["label"].split()[1]]
    assert mean == pytest.approx(sum(values) / len(values), abs=6e-4)


@pytest.mark.parametrize("comparison", STUDY["comparisons"], ids=lambda row: row["label"])
def test_a_difference_and_its_verdict_match_the_results(comparison: dict) -> None:
    _, difference, verdict = ROWS[comparison["label"].split()[1]]
    numbers = [float(number) for number in re.findall(r"[-+]\d\.\d+", difference)]
    assert numbers == pytest.approx([comparison["mean"], comparison["low"], comparison["high"]], abs=6e-4)
    assert comparison["verdict"] == verdict
