"""The simulated accelerator, and what a watch costs on it: operator calls and host waits, which do not depend on the
machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCENARIOS = Path(__file__).parents[1] / "helpers" / "simulated_scenarios.py"
# Of 11 steps with a sample every 5, and at the first.
SAMPLED = {0, 4, 9}


def run(name: str) -> Any:
    command = [sys.executable, str(SCENARIOS), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "could not measure" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def test_simulated_accelerator_refuses_mixed_devices_and_counts_waits() -> None:
    found = run("devices")
    assert (found["device"], found["new"]) == ("simgpu:0", "simgpu:0")
    assert "same device" in found["two devices"]
    assert found["quiet"] == {}
    assert found["launches"] == {"mul": 1, "sum": 1, "copy_": 1, "add_": 1}
    assert (found["values"], found["total"]) == ([7.0, 11.0, 15.0], 33.0)
    assert found["waits"] == {"copy to host": 2, "item": 1, "blocking copy to device": 1}


@pytest.fixture(scope="module")
def watched() -> Any:
    return run("watched")


def test_unsampled_watched_step_makes_no_host_wait(watched: Any) -> None:
    assert watched["plain"] == {}
    assert watched["losses"] == 11
    unsampled = [step for at, step in enumerate(watched["steps"]) if at not in SAMPLED]
    assert [step["waits"] for step in unsampled] == [{}] * 8


def test_sampled_watched_step_copies_to_the_host_once(watched: Any) -> None:
    assert {"stream_rms", "update_ratio", "adam_ratio", "attention_logit"} <= set(watched["signals"])
    first, *later = (watched["steps"][at]["waits"] for at in sorted(SAMPLED))
    assert later == [{"copy to host": 1}] * 2
    # The first sample also copies lists of places to the device, which are kept.
    assert first.keys() == {"copy to host", "blocking copy to device"}
    assert first["copy to host"] == 1


def test_watched_step_calls_no_more_operators_than_its_budget(watched: Any) -> None:
    """For a Thinker of 12 blocks; the step itself calls about 2,000."""
    launches = [step["launches"] for step in watched["steps"]]
    assert max(count for at, count in enumerate(launches) if at not in SAMPLED) <= 80
    assert max(launches) <= 2000
