"""A fixed sample of the board: faults found with their cause and layer, and healthy runs without a fail."""

from __future__ import annotations

import math

import pytest
from faults import run as runs
from faults.architectures import ARCHITECTURES
from faults.plan import SEEDS
from faults.run import Case, effect_of, run
from faults.score import Verdict, judge, new_alarms
from faults.training import STEPS, VARIANTS, Training, middle_of


def verdict_on(architecture: str, fault: str, steps: int = STEPS) -> Verdict:
    """Return the verdict on the faulty run with the first seed."""
    case = Case(architecture, SEEDS[ARCHITECTURES[architecture].split][0], fault=fault)
    return judge(run(case, steps), runs.healthy(case.twin).line)


@pytest.mark.parametrize(
    ("architecture", "fault"),
    [
        ("llama", "NaN in a weight"),
        ("gpt2", "NaN in one batch"),
        ("nanogpt", "NaN in a gradient"),
        ("llama", "weights × 100 later"),
        ("nanogpt", "half of the blocks in no optimizer"),
        ("thinker", "block does nothing"),
    ],
)
def test_fault_is_found_with_its_cause_and_layer(architecture: str, fault: str) -> None:
    verdict = verdict_on(architecture, fault)
    assert verdict.effect
    assert verdict.cause, verdict.line["alarms"]
    assert verdict.layer, verdict.line["alarms"]


@pytest.mark.parametrize(("architecture", "fault"), [("thinker", "learning rate × 100"), ("llama", "Adam's ε 1")])
def test_fault_of_the_whole_run_is_found_with_its_cause(architecture: str, fault: str) -> None:
    verdict = verdict_on(architecture, fault)
    assert verdict.effect
    assert verdict.cause, verdict.line["alarms"]


@pytest.mark.parametrize("architecture", ["nanogpt", "thinker", "llama", "gpt2"])
def test_healthy_run_raises_no_fail(architecture: str) -> None:
    line = run(Case(architecture, SEEDS[ARCHITECTURES[architecture].split][0]))
    assert line["last"] < line["first"]
    assert not [alarm for alarm in line["alarms"] if alarm[1] == "fail"]


# The runs themselves --------------------------------------------------------------------------------------------------


def test_run_is_the_same_again() -> None:
    case = Case("nanogpt", 1, fault="labels always shuffled")
    first, second = run(case), run(case)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_watch_does_not_change_a_run() -> None:
    plain = Training(ARCHITECTURES["nanogpt"], 0)
    plain.build_optimizers()
    plain.run()
    assert plain.losses == runs.healthy(Case("nanogpt", 0)).training.losses


def test_twin_of_itself_has_no_effect() -> None:
    twin = runs.healthy(Case("nanogpt", 0))
    assert effect_of(twin, twin) == {"loss": 0.0, "evaluation": 0.0, "weights": 0.0, "part": 0.0}


# Slow -----------------------------------------------------------------------------------------------------------------

ALARM_WITHIN = 10
WIDER = ("llama-256", "gpt2-256")
"""Architectures that differ from another one in their width only."""
# Tests of one architecture follow each other (scope="module"), because they share its healthy run.
each_architecture = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in WIDER else pytest.mark.slow)
        for name in sorted(ARCHITECTURES)
    ],
    scope="module",
)


@each_architecture
def test_every_architecture_learns(architecture: str) -> None:
    line = runs.healthy(Case(architecture, SEEDS[ARCHITECTURES[architecture].split][0])).line
    assert "error" not in line
    assert line["last"] < 0.97 * line["first"]


@each_architecture
def test_nan_in_a_weight_is_found_in_every_architecture(architecture: str) -> None:
    if architecture in ("lora", "linear-probe"):
        pytest.skip("most of its weights are frozen")
    begins = middle_of(SEEDS[ARCHITECTURES[architecture].split][0])
    verdict = verdict_on(architecture, "NaN in a weight", begins + ALARM_WITHIN)
    assert verdict.cause, verdict.line["alarms"]
    assert verdict.layer, verdict.line["alarms"]
    assert new_alarms(verdict.line, None)[0][0] - verdict.line["begins"] <= ALARM_WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_trains(variant: str) -> None:
    line = run(Case("llama", 0, variant))
    assert "error" not in line
    assert math.isfinite(line["last"])
    assert line["last"] < line["first"]
