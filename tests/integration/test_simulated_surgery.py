"""Surgery and comparisons on the simulated accelerator: the CPU's results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import PATIENCE

SCENARIOS = Path(__file__).parents[1] / "helpers" / "simulated_surgery.py"


def run(name: str) -> Any:
    done = subprocess.run([sys.executable, str(SCENARIOS), name], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("scenario", "where"),
    [pytest.param("operated", "cpu", marks=pytest.mark.slow), ("proved_on_the_device", "simgpu:0")],
)
def test_surgery_changes_the_same_wherever_the_model_and_the_proof_are(scenario: str, where: str) -> None:
    found = run(scenario)
    for norm, count in (("rmsnorm", 5), ("layernorm", 10), ("rotated rmsnorm", 21)):
        ours, theirs = found[f"{norm} simgpu"], found[f"{norm} cpu"]
        assert (ours["where"], theirs["where"]) == ([where] * 2, ["cpu"] * 2)
        assert ours["summary"].endswith("0 refused")
        assert ("in float64 on simgpu:0," in ours["summary"]) == (where != "cpu")
        assert "in float64," in theirs["summary"]
        assert (ours["devices"], theirs["devices"]) == (["simgpu:0"], ["cpu"])
        assert ours["weights"] == pytest.approx(theirs["weights"], rel=1e-14)
        assert ours["changed"] == theirs["changed"]
        assert len(ours["changed"]) == count
        assert ours["swapped"] == theirs["swapped"] == ["1"]
        assert ours["exact"]
        assert ours["undone"]
        assert ours["largest"] == 0.0


def test_the_first_difference_is_found_wherever_the_models_are() -> None:
    found = run("parted")
    assert len(found) == 8
    for name, (equal, first, fed) in found.items():
        assert equal == "equal" or ("float64" not in name and equal == "rounding"), name
        assert first == "blocks.1.feed_forward.up", name
        assert fed == pytest.approx(0.5, rel=1e-5), name


def test_comparisons_on_the_device_give_the_outcomes_of_the_cpu() -> None:
    found = run("compared")
    for protocol in ("train", "ramp", "init"):
        assert (found[f"{protocol} simgpu on"], found[f"{protocol} cpu on"]) == ("simgpu:0", "cpu")
        assert numbers(found[f"{protocol} simgpu"]) == pytest.approx(numbers(found[f"{protocol} cpu"]), rel=1e-6)
        assert len(numbers(found[f"{protocol} cpu"])) >= 5
    # A factory that builds its model on the accelerator is probed there, and trained where the run belongs.
    assert found["factory"][1] == pytest.approx(found["factory"][0], rel=1e-6)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, float | int) else []
