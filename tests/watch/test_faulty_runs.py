"""The alarms on real trainings: 12 sick runs, each caught in time by its right name, and 20 healthy ones left alone."""

from __future__ import annotations

import pytest
from helpers.faulty_runs import HEALTHY, HEALTHY_TWIN, SICK, Recipe, Training, complaints, confusion, lost_at, run
from torch import nn


@pytest.mark.slow
def test_sick_runs_are_caught() -> None:
    healthy = run(HEALTHY_TWIN)
    assert healthy.alarms == []
    outcomes = {name: run(sick.recipe) for name, sick in SICK.items()}
    print(confusion(outcomes, healthy.losses))
    wrong = {name: complaints(sick, outcomes[name], healthy.losses) for name, sick in SICK.items()}
    assert len(wrong) == 12
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.slow
def test_healthy_runs_are_left_alone() -> None:
    outcomes = {name: run(recipe) for name, recipe in HEALTHY.items()}
    assert len(outcomes) == 20
    assert all(outcome.losses[-1] < 0.6 * outcome.losses[0] for outcome in outcomes.values()), "they do learn"
    # Not a single warning either.
    assert {name: outcome.alarms for name, outcome in outcomes.items() if outcome.alarms} == {}


def pytorchs_start(training: Training) -> None:
    """The embedding and the linear layers as PyTorch makes them: the embedding has a deviation of 1."""
    training.model.embedding.reset_parameters()
    for module in training.model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def test_a_rate_too_high_is_named_whatever_the_embedding_starts_with() -> None:
    sick = run(Recipe(steps=40, lr=9e-2, warmup=0, prepare=pytorchs_start))
    assert [(alarm.rule, alarm.layer) for alarm in sick.fails] == [("learning-rate", None)]
    assert sick.fails[0].step <= 20
    assert run(Recipe(steps=40, prepare=pytorchs_start)).alarms == []


def test_what_lost_means() -> None:
    healthy = [3.0] * 60
    assert lost_at(healthy, healthy) is None
    assert lost_at([*[3.0] * 10, *[3.4] * 19, 3.0, *[3.4] * 10], healthy) is None
    assert lost_at([*[3.0] * 10, *[3.4] * 30], healthy) == 30
    assert lost_at([*[3.0] * 10, *[float("nan")] * 30], healthy) == 30
