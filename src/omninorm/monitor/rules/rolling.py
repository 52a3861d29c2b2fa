"""Rolling mean and noise of a series, to judge its next value."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 128
FEWEST = 16
"""Fewest values for an estimate."""


class Rolling:
    """Mean m and noise σ of the last 128 values.

    σ² is half the mean squared difference of neighbouring values. For independent noise this is the variance. Unlike
    the variance it ignores a trend, so the steep first hundred steps of a run do not hide a spike. A value above
    m + 6σ is stored as m + 6σ: the first spike must not raise the limit for the next one, but a lasting shift does.
    """

    def __init__(self) -> None:
        self._before = 0
        self._values: deque[float] = deque(maxlen=WINDOW)
        self._squares: deque[float] = deque(maxlen=WINDOW - 1)  # squared differences of neighbours

    @property
    def before(self) -> int:
        """The number of values that the newest one was compared with."""
        return self._before

    def expected(self) -> tuple[float, float] | None:
        """Return (m, σ), or None while there are too few values."""
        count = len(self._values)
        if count < FEWEST:
            return None
        return sum(self._values) / count, math.sqrt(sum(self._squares) / (2 * (count - 1)))

    def add(self, value: float, expected: tuple[float, float] | None) -> None:
        """Append a finite value. `expected` is the (m, σ) it was compared with."""
        self._before = len(self._values)
        value = value if expected is None else min(value, expected[0] + 6.0 * expected[1])
        if self._values:
            difference = value - self._values[-1]
            self._squares.append(difference * difference)
        self._values.append(value)
