"""The table of docs/placements.md says what docs/placements/results.json says."""

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


def test_every_placement_is_named_and_every_measurement_told() -> None:
    assert all(f"| `{name}` |" in PAGE for name in PLACEMENTS)
    assert set(ROWS) == {each["label"].split()[1] for each in STUDY["configurations"]}


@pytest.mark.parametrize("configuration", STUDY["configurations"], ids=lambda each: each["label"])
def test_means(configuration: dict) -> None:
    values = configuration["values"].values()
    told, _, _ = ROWS[configuration["label"].split()[1]]
    assert told == pytest.approx(sum(values) / len(values), abs=6e-4)


@pytest.mark.parametrize("comparison", STUDY["comparisons"], ids=lambda each: each["label"])
def test_differences_and_verdicts(comparison: dict) -> None:
    _, told, verdict = ROWS[comparison["label"].split()[1]]
    numbers = [float(number) for number in re.findall(r"[-+]\d\.\d+", told)]
    assert numbers == pytest.approx([comparison["mean"], comparison["low"], comparison["high"]], abs=6e-4)
    assert comparison["verdict"].split(":")[0] == verdict
