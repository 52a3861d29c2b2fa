"""Helpers for rules: formatting, quantiles, streaks and line fits."""

from __future__ import annotations

import math

import pytest
import torch

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.numbers import (
    Streaks,
    earlier,
    finite,
    fold,
    line_error,
    median,
    quantile,
    value_at,
    values_of,
)


def test_what_a_straight_line_leaves() -> None:
    assert line_error([2.0, 5.0, 8.0, 11.0]) == pytest.approx(0.0, abs=1e-12)
    assert line_error([4.0, 4.0, 4.0]) == 0.0
    assert line_error([1.0, -1.0, -1.0, 1.0]) == pytest.approx(1.0)
    values = torch.tensor([0.3, 1.9, 1.1, 4.0, 2.5], dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack([torch.arange(5.0, dtype=torch.float64), values]))[0, 1]
    assert line_error(values.tolist()) == pytest.approx(1 - float(correlation) ** 2)


def test_factors_are_rounded_to_three_digits() -> None:
    assert [fold(ratio) for ratio in (2.0, 39.96, 999.0, 1234.5, 48_271.0, 2.5e8, 3e12)] == [
        "2-fold", "40-fold", "999-fold", "1,230-fold", "48,300-fold", "250,000,000-fold", "3e+12-fold",
    ]  # fmt: skip


def test_quantiles_are_values_of_the_list() -> None:
    values = [5.0, 1.0, 4.0, 2.0]
    assert [quantile(values, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median(values) == 4.0


def test_values_that_are_not_finite_numbers_are_none() -> None:
    assert [finite(value) for value in (1, 2.5, None, math.nan, math.inf, "3")] == [1.0, 2.5, None, None, None, None]
    sample = Sample(1, {"a": [1.0, math.nan, 3.0]})
    assert values_of(sample, "a") == [1.0, None, 3.0]
    assert values_of(sample, "b") == []
    assert [value_at(sample, "a", index) for index in range(4)] == [1.0, None, 3.0, None]
    assert value_at(sample, "a") == 1.0


def test_earlier_values_exclude_the_newest() -> None:
    history = History()
    history.samples.extend(Sample(step, {"a": [float(step), math.nan]}) for step in range(1, 6))
    assert earlier(history, "a", 0, 2) == [3.0, 4.0]
    assert earlier(history, "a", 0, 9) == [1.0, 2.0, 3.0, 4.0]
    assert earlier(history, "a", 1, 9) == []


def test_streaks_count_samples_and_steps() -> None:
    streaks = Streaks()
    assert [streaks.lasts("a", True, step, samples=3) for step in (1, 2, 3, 4)] == [False, False, True, True]
    assert not streaks.lasts("a", False, 5, samples=1)
    assert [streaks.lasts("a", True, step, samples=1, steps=10) for step in (10, 19, 20)] == [False, False, True]
    assert not streaks.lasts("b", True, 20, samples=2)
    streaks.end("a")
    assert not streaks.lasts("a", True, 21, samples=2)
