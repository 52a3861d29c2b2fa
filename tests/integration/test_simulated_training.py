"""Training, resuming and generating on the simulated accelerator: the CPU's numbers, and what the host waits for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import PATIENCE

SCENARIOS = Path(__file__).parents[1] / "helpers" / "simulated_training.py"
# The norms' operators differ between the devices: a relative error of a few roundings of float32 per layer.
ROUNDING = 16 * 2**-24


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    def run(name: str) -> Any:
        command = [sys.executable, str(SCENARIOS), name, str(tmp_path_factory.mktemp(name))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def trained(scenario: Callable[[str], Any]) -> Any:
    return scenario("trained")


# bfloat16 keeps 8 bits and float16 11, and autocast rounds other operators on the two devices.
@pytest.mark.parametrize(("precision", "error"), [("float32", ROUNDING), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_training_on_the_device_gives_the_numbers_of_the_cpu(trained: Any, precision: str, error: float) -> None:
    ours, theirs = trained[f"{precision} simgpu"], trained[f"{precision} cpu"]
    assert len(ours["losses"]) == 8
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=error)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=4 * error)
    assert ours["bits"] == pytest.approx(theirs["bits"], rel=error)


def test_precisions_differ(trained: Any) -> None:
    losses = [trained[f"{precision} simgpu"]["losses"] for precision in ("float32", "bfloat16", "float16")]
    assert losses[0] != losses[1] != losses[2] != losses[0]


def test_a_step_waits_once_and_an_evaluation_once(scenario: Callable[[str], Any], trained: Any) -> None:
    found = {event: sum(waits.values()) for event, waits in scenario("waits")}
    # A step is reported while the next one runs; the check of the weights at step 4 falls into the report of step 5.
    assert found == {
        "EvalEvent 0": 1,
        **{f"StepEvent {step}": 1 for step in (1, 2, 3, 4, 6, 7, 8)},
        "StepEvent 5": 2,
        "EvalEvent 8": 1,
        "StopEvent 8": 1,
    }
    # 8 steps, 3 evaluations and 2 checks of the weights, also if a scaler scales the loss.
    assert {trained[f"{name} simgpu"]["waits"] for name in ("float32", "bfloat16", "float16")} == {13}


@pytest.fixture(scope="module")
def resumed(scenario: Callable[[str], Any]) -> Any:
    return scenario("resumed")


@pytest.mark.slow
def test_a_run_continues_on_another_device(resumed: Any) -> None:
    straight = resumed["cpu"]
    for way in ("gpu", "cpu-gpu", "gpu-cpu"):
        assert resumed[way]["losses"] == pytest.approx(straight["losses"], rel=ROUNDING), way
        # Adam's first steps have the size of the learning rate, 0.003, whatever a gradient's size.
        assert resumed[way]["weights"] == pytest.approx(straight["weights"], abs=0.003 * 2**-8), way
    assert resumed["gpu-cpu"]["notices"][0] == (
        "the run was started on simgpu:0 and continues on cpu: results are equal up to rounding"
    )
    assert (resumed["cpu-gpu"]["device"], resumed["gpu-cpu"]["device"]) == ("cpu", "simgpu:0")


def test_a_run_continues_bit_identically_on_its_device(resumed: Any) -> None:
    for key in ("losses", "weights", "bits"):
        assert resumed["gpu-gpu"][key] == resumed["gpu"][key]
    assert not any("started on" in notice for notice in resumed["gpu-gpu"]["notices"])


def test_a_watch_measures_the_same_on_the_device(resumed: Any) -> None:
    ours, theirs = resumed["gpu"]["signals"], resumed["cpu"]["signals"]
    assert ours.keys() == theirs.keys() >= {"stream_rms", "stream_grad", "update_ratio", "attention_logit"}
    for name in ("stream_rms", "stream_grad", "update_ratio", "attention_logit"):
        # None where a sample has no value: the record has four digits.
        assert [each is None for each in ours[name]] == [each is None for each in theirs[name]], name
        measured = [each for each in theirs[name] if each is not None]
        assert len(measured) >= 2
        assert [each for each in ours[name] if each is not None] == pytest.approx(measured, rel=1e-3), name


def test_a_diverged_run_ends_at_the_same_step_without_a_bad_checkpoint(scenario: Callable[[str], Any]) -> None:
    found = scenario("diverged")
    assert found["simgpu"] == found["cpu"]
    assert (found["cpu"]["status"], found["cpu"]["steps"], found["cpu"]["saved"]) == ("diverged", 2, ["step-1"])


def test_a_nan_is_found_one_step_later_and_nothing_is_saved(scenario: Callable[[str], Any]) -> None:
    assert scenario("late") == {"status": "diverged", "step": 4, "passes": 5, "saved": []}


def test_generating_on_the_device_gives_the_text_of_the_cpu(scenario: Callable[[str], Any]) -> None:
    found = scenario("generated")
    assert found["simgpu"] == found["cpu"]
    assert found["batch simgpu"] == found["batch cpu"]
    assert [len(row) for row in found["batch cpu"]] == [20, 20]
    assert found["waits"] == 0


def test_commands_prefer_the_device_and_name_it(scenario: Callable[[str], Any]) -> None:
    found = scenario("commanded")
    assert [found[name]["code"] for name in ("train", "resume", "moved", "generate")] == [0] * 4
    line = "Device simgpu:0, float32, this command is not yet measured on a GPU\n"
    assert line in found["train"]["out"]
    assert line in found["resume"]["out"]
    assert line not in found["moved"]["out"]
    assert "started on simgpu:0 and continues on cpu: results are equal up to rounding" in found["moved"]["out"]
    assert found["absent"]["code"] == 2
    assert "must be one of the GPUs that PyTorch sees, simgpu:0, got simgpu:7" in found["absent"]["err"]
    assert not found["written"]
