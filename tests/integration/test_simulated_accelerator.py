"""The simulated accelerator, and what a watch costs on it: operator calls and host waits, which do not depend on the
machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import PATIENCE

SCENARIOS = Path(__file__).parents[1] / "helpers" / "simulated_scenarios.py"
# The sampled steps of 11, with a sample at the first step and every 5 steps.
SAMPLED = {0, 4, 9}


def run(name: str) -> Any:
    command = [sys.executable, str(SCENARIOS), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
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
    assert max(count for at, count in enumerate(launches) if at not in SAMPLED) <= 32
    # In the first step each output is measured at once.
    assert launches[0] <= 550
    assert max(launches[at] for at in SAMPLED - {0}) <= 500


def test_outputs_are_measured_as_they_were_before_changes_in_place() -> None:
    found = run("outputs")
    for name in ("never", "always", "no memory"):
        waited, at_once = found[name]
        assert str(waited) == str(at_once), name  # equal, and NaN where the other is
    assert found["always"][0]["first"] == [3, "2"]  # not the layer whose output was changed
    (waited, _), (at_once, _) = (each.values() for each in found["later"])
    # In the third step the first layer's output is changed for the first time while it waits.
    assert waited[2][0] == 0.5 * at_once[2][0]
    waited[2][0] = at_once[2][0]
    assert waited == at_once
    assert at_once[3][0] > 0


def test_outputs_that_wait_take_a_limited_amount_of_memory() -> None:
    assert run("kept") == [4000, 8000, 0, 4000, 8000]


def test_norms_on_the_device_are_pytorchs_operators_with_the_cpus_numbers() -> None:
    found = run("norms")
    assert {name: each["backend"] for name, each in found.items()} == {
        "rms_norm": "torch", "layer_norm": "torch", "add_layer_norm": "torch", "llama": "reference",
    }  # fmt: skip
    assert all(each["gap"] < 1e-5 and each["waits"] == {} for each in found.values())
    # The device has no kernel for RMSNorm, like the CPU.
    assert found["layer_norm"]["launches"] == {"native_layer_norm": 1}
    assert found["add_layer_norm"]["launches"] == {"add": 2, "native_layer_norm": 1}
    assert sum(found["rms_norm"]["launches"].values()) <= 6
    assert sum(found["llama"]["launches"].values()) > 12
