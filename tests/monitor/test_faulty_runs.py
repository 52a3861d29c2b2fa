"""Alarms on real trainings: 12 faulty runs are reported correctly and in time, 20 healthy ones raise no alarm."""

from __future__ import annotations

import pytest
from helpers.faulty_runs import FAULTY, HEALTHY, HEALTHY_TWIN, Recipe, Training, complaints, confusion, diverged_at, run
from torch import nn


@pytest.mark.slow
def test_faults_are_reported_with_the_right_rule_and_layer_in_time() -> None:
    healthy = run(HEALTHY_TWIN)
    assert healthy.alarms == []
    outcomes = {name: run(faulty.recipe) for name, faulty in FAULTY.items()}
    print(confusion(outcomes, healthy.losses))
    wrong = {name: complaints(faulty, outcomes[name], healthy.losses) for name, faulty in FAULTY.items()}
    assert len(wrong) == 12
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.slow
def test_healthy_runs_raise_no_alarm() -> None:
    outcomes = {name: run(recipe) for name, recipe in HEALTHY.items()}
    assert len(outcomes) == 20
    assert all(outcome.losses[-1] < 0.6 * outcome.losses[0] for outcome in outcomes.values()), "the runs do learn"
    # No warnings either.
    assert {name: outcome.alarms for name, outcome in outcomes.items() if outcome.alarms} == {}


def pytorch_initialization(training: Training) -> None:
    """Initialize the embedding and the linear layers as PyTorch does: the embedding has std 1."""
    training.model.embedding.reset_parameters()
    for module in training.model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


@pytest.mark.slow
def test_learning_rate_too_high_is_reported_with_pytorch_initialization() -> None:
    faulty = run(Recipe(steps=30, lr=9e-2, warmup=0, prepare=pytorch_initialization))
    assert [(alarm.rule, alarm.layer) for alarm in faulty.fails] == [("learning-rate", None)]
    assert faulty.fails[0].step <= 20
    healthy = run(Recipe(steps=30, prepare=pytorch_initialization))
    assert [(alarm.rule, alarm.severity) for alarm in healthy.alarms] == [("initialization", "warn")]


def test_run_has_diverged_after_twenty_bad_steps() -> None:
    healthy = [3.0] * 60
    assert diverged_at(healthy, healthy) is None
    assert diverged_at([*[3.0] * 10, *[3.4] * 19, 3.0, *[3.4] * 10], healthy) is None
    assert diverged_at([*[3.0] * 10, *[3.4] * 30], healthy) == 30
    assert diverged_at([*[3.0] * 10, *[float("nan")] * 30], healthy) == 30
