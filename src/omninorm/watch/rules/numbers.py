"""What the rules compute with: numbers that may be missing, medians, counts of samples running, straight lines."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

from omninorm.watch.history import History, Sample


def finite(value: object) -> float | None:
    """The value as a float; None for None, NaN, infinities and whatever is no number."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def value_at(sample: Sample, signal: str, index: int = 0) -> float | None:
    """A finite value of a signal, or None."""
    values = sample.signals.get(signal, ())
    return finite(values[index]) if index < len(values) else None


def values_of(sample: Sample, signal: str) -> list[float | None]:
    """All values of a signal, those that are not finite as None; empty where it was not seen."""
    return [finite(value) for value in sample.signals.get(signal, ())]


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are there."""
    return [value for value in values if value is not None]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which about `share` of the values lie; of at least one value."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def median(values: Sequence[float]) -> float:
    """The upper median of at least one value."""
    return quantile(values, 0.5)


def earlier(history: History, signal: str, index: int, count: int) -> list[float]:
    """Finite values of a layer at up to `count` samples before the newest, oldest first."""
    newest = len(history.samples) - 1
    samples = (history.samples[at] for at in range(max(newest - count, 0), newest))
    return known(value_at(sample, signal, index) for sample in samples)


class Streaks:
    """For how long something has held without interruption, per key."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, tuple[int, int]] = {}

    def lasts(self, key: Hashable, holds: bool, step: int, samples: int, steps: int = 0) -> bool:
        """Whether it holds now, at `step`, and has at this many samples running that span this many steps or more."""
        if not holds:
            self.end(key)
            return False
        count, since = self._runs.get(key, (0, step))
        self._runs[key] = count + 1, since
        return count + 1 >= samples and step - since >= steps

    def end(self, key: Hashable) -> None:
        """It does not hold now."""
        self._runs.pop(key, None)


def line_error(values: Sequence[float]) -> float:
    """Share of the variance of `values` that a straight line over their index leaves: 1 − R², in [0, 1]."""
    count = len(values)
    mean = sum(values) / count
    spread = sum((value - mean) * (value - mean) for value in values)
    if spread <= 0.0:
        return 0.0
    # The deviations add up to 0, so the indices need no mean of their own.
    slope_part = sum(index * (value - mean) for index, value in enumerate(values))
    index_part = count * (count * count - 1) / 12
    return max(0.0, 1.0 - slope_part * slope_part / (index_part * spread))


def fold(ratio: float) -> str:
    """A factor in words: "40-fold", "1,230-fold"."""
    if not 1e3 <= ratio < 1e9:
        return f"{ratio:.3g}-fold"
    unit = 10 ** (math.floor(math.log10(ratio)) - 2)
    return f"{round(ratio / unit) * unit:,}-fold"
