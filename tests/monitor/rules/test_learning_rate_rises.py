"""learning-rate-rises: schedules of PyTorch that pass their end, and others that rise for other reasons."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.histories import give_steps, numbers_in
from torch.optim import lr_scheduler as schedulers

from omninorm.monitor.rules.learning_rate_rises import LearningRateRises

pytestmark = pytest.mark.usefixtures("words")
Build = Callable[[torch.optim.Optimizer], Any]


def rates_of(build: Build, steps: int = 400, lr: float = 1e-3) -> list[float]:
    """Return the learning rates of a schedule."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler, found = build(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def alarms_of(rates: list[float]) -> list[Any]:
    return give_steps(LearningRateRises(), [3.0] * len(rates), lrs=rates)


def cosine(length: int, floor: float = 0.0) -> Build:
    return lambda optimizer: schedulers.CosineAnnealingLR(optimizer, length, floor)


def shape(function: Callable[[int], float]) -> Build:
    return lambda optimizer: schedulers.LambdaLR(optimizer, function)


@pytest.mark.parametrize(("length", "floor"), [(100, 0.0), (100, 1.9e-4), (37, 0.0), (1000, 1e-5)])
def test_cosine_past_its_end_is_a_warning(length: int, floor: float) -> None:
    rates = rates_of(cosine(length, floor), 2 * length)
    first = next(at for at, rate in enumerate(rates) if at >= length + 10 and rate - floor >= 0.02e-3)
    (alarm, *_) = alarms_of(rates)
    assert (alarm.severity, alarm.layer) == ("warn", None)
    assert alarm.step == first + 1
    assert numbers_in(alarm.evidence)[:4] == pytest.approx([1e-3, 1, max(floor, rates[length]), length + 1], abs=1e-9)


def test_cosine_after_a_warm_up_is_a_warning() -> None:
    rates = rates_of(shape(lambda at: min(1.0, at / 20) * (0.5 + 0.5 * math.cos(math.pi * max(0, at - 20) / 100))))
    assert alarms_of(rates)[0].step > 121


HEALTHY: dict[str, Build] = {
    "cosine": cosine(400),
    "cosine to a fifth": cosine(100, 2.1e-4),
    "restarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 50),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 1e-3, 400),
    "cyclic": lambda optimizer: schedulers.CyclicLR(optimizer, 1e-5, 1e-3, 40),
    "linear": shape(lambda at: max(0.0, 1 - at / 300)),
    "linear warm-up again": shape(lambda at: 1 - at / 200 if at < 190 else min(0.5, 0.05 + (at - 190) / 100)),
    "inverse root": shape(lambda at: min((at + 1) / 50, (50 / (at + 1)) ** 0.5)),
    "constant": shape(lambda at: 1.0),
    "steps": lambda optimizer: schedulers.StepLR(optimizer, 50, 0.1),
    "quadratic warm-up": shape(lambda at: min(1.0, (at / 100) ** 2)),
    "noisy": shape(lambda at: max(0.0, 1 - at / 200) + 1e-3 * (at % 7)),
}


@pytest.mark.parametrize("build", HEALTHY.values(), ids=HEALTHY)
def test_other_schedules_are_silent(build: Build) -> None:
    assert alarms_of(rates_of(build)) == []


def test_short_fall_is_silent() -> None:
    """A dip of a few steps is no schedule: 9 steps from the peak to the lowest learning rate, but not 10."""
    dip = [*[1e-3] * 5, *(1e-3 * (1 - at / 10) for at in range(1, 10))]
    rise = [1e-4 + 1e-3 * (at / 40) ** 2 for at in range(1, 40)]
    assert alarms_of([*dip[5:], *rise]) == []
    assert alarms_of([1e-3, 1e-3 - 1e-9, 1e-3 - 2e-9, *dip[5:], *rise]) != []


def rise_after(plateau: int, power: float = 2.0, dip: float = 0.0) -> list[float]:
    """A linear fall over 50 steps, a plateau, and a rise in 60 steps that may dip at every seventh."""
    fall = [1e-3 * (1 - at / 50) for at in range(50)]
    rise = [5e-4 * (at / 60) ** power * (1 - dip * (at % 7 == 0)) for at in range(1, 61)]
    return [*fall, *[0.0] * plateau, *rise]


def test_rise_counts_from_the_end_of_a_plateau() -> None:
    (alarm, *_) = alarms_of(rise_after(100))
    assert numbers_in(alarm.evidence)[3] == 150


@pytest.mark.parametrize(("power", "dip"), [(3.0, 0.0), (1.0, 0.0), (2.0, 0.5)])
def test_rise_that_is_not_a_cosines_is_silent(power: float, dip: float) -> None:
    assert alarms_of(rise_after(1, power, dip)) == []
    assert alarms_of(rise_after(1)) != []


def test_fall_counts_from_the_end_of_the_peak() -> None:
    assert alarms_of([*[1e-3] * 50, 5e-4, *rise_after(0)[50:]]) == []


def test_long_schedule_is_kept_in_few_numbers() -> None:
    rule, rates = LearningRateRises(), rates_of(cosine(3000), 3600)
    (alarm, *_) = give_steps(rule, [3.0] * len(rates), lrs=rates)
    assert 3000 < alarm.step < 3400
    assert len(rule._rates) <= 129
    assert all(after - before <= 2 * rule._stride for (before, _), (after, _) in pairwise(rule._rates))


def test_unknown_learning_rates_are_silent() -> None:
    assert alarms_of([math.nan] * 50) == []
