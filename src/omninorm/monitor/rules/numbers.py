"""Helpers for rules: numbers that may be missing, medians, streaks of samples, and line fits."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

from omninorm.monitor.history import History, Sample


def finite(value: object) -> float | None:
    """Return the value as a float; None for NaN, infinities and anything that is not a number."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def value_at(sample: Sample, signal: str, index: int = 0) -> float | None:
    """Return one value of a signal; None if it is missing or not finite."""
    values = values_of(sample, signal)
    return values[index] if index < len(values) else None


def values_of(sample: Sample, signal: str) -> list[float | None]:
    """Return all values of a signal, with None for those that are not finite; empty if it is missing. The list is
    shared: do not change it."""
    found = sample.finite.get(signal)
    if found is None:
        found = sample.finite[signal] = [finite(value) for value in sample.signals.get(signal, ())]
    return found


def known(values: Iterable[float | None]) -> list[float]:
    """Drop the missing values."""
    return [value for value in values if value is not None]


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which about `share` of the values lie. `values` must not be empty."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def median(values: Sequence[float]) -> float:
    """Return the upper median. `values` must not be empty."""
    return quantile(values, 0.5)


def earlier(history: History, signal: str, index: int, count: int) -> list[float]:
    """Return a layer's finite values at up to `count` samples before the newest, oldest first."""
    newest = len(history.samples) - 1
    samples = (history.samples[at] for at in range(max(newest - count, 0), newest))
    return known(value_at(sample, signal, index) for sample in samples)


class Streaks:
    """Counts, per key, how long a condition has held without interruption."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, tuple[int, int]] = {}

    def lasts(self, key: Hashable, holds: bool, step: int, samples: int, steps: int = 0) -> bool:
        """Return whether the condition holds now and has held for `samples` consecutive samples over `steps` steps."""
        if not holds:
            self.end(key)
            return False
        count, since = self._runs.get(key, (0, step))
        self._runs[key] = count + 1, since
        return count + 1 >= samples and step - since >= steps

    def running(self) -> list[Hashable]:
        """Return the keys whose condition holds."""
        return list(self._runs)

    def end(self, key: Hashable) -> None:
        """Reset a key: its condition does not hold now."""
        self._runs.pop(key, None)


def line_error(values: Sequence[float]) -> float:
    """Return 1 − R² of a straight line through `values` over their index, in [0, 1]."""
    count = len(values)
    mean = sum(values) / count
    spread = sum((value - mean) * (value - mean) for value in values)
    if spread <= 0.0:
        return 0.0
    # The residuals sum to 0, so the indices need not be centred.
    slope_part = sum(index * (value - mean) for index, value in enumerate(values))
    index_part = count * (count * count - 1) / 12
    return max(0.0, 1.0 - slope_part * slope_part / (index_part * spread))


def fold(ratio: float) -> str:
    """Format a change: "40-fold", "1,230-fold"."""
    return f"{factor(ratio)}-fold"


def factor(ratio: float) -> str:
    """Format a ratio with three significant digits: "40", "1,230"."""
    if not 1e3 <= ratio < 1e9:
        return f"{ratio:.3g}"
    unit = 10 ** (math.floor(math.log10(ratio)) - 2)
    return f"{round(ratio / unit) * unit:,}"
