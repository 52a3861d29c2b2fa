"""Rolling: what a series is expected to do next, from its newest values."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 128
FEWEST = 16
"""Values below which nothing is expected."""


class Rolling:
    """Mean m and noise σ of the last 128 values.

    σ² is half the mean squared difference of neighbours. For independent noise that is the variance; unlike the
    variance it ignores a trend, and the steep first hundred steps of a run do not hide a spike in it. A value above
    m + 6σ enters as m + 6σ: the first spike must not raise the bar for the next, but a lasting shift does move it.
    """

    def __init__(self) -> None:
        self._before = 0
        self._values: deque[float] = deque(maxlen=WINDOW)
        self._squares: deque[float] = deque(maxlen=WINDOW - 1)  # of the differences

    @property
    def before(self) -> int:
        """How many values the newest one was compared with."""
        return self._before

    def expected(self) -> tuple[float, float] | None:
        """(m, σ), or None while there are too few values."""
        count = len(self._values)
        if count < FEWEST:
            return None
        return sum(self._values) / count, math.sqrt(sum(self._squares) / (2 * (count - 1)))

    def add(self, value: float, expected: tuple[float, float] | None) -> None:
        """Appends a finite value; `expected` is what was expected of it."""
        self._before = len(self._values)
        value = value if expected is None else min(value, expected[0] + 6.0 * expected[1])
        if self._values:
            difference = value - self._values[-1]
            self._squares.append(difference * difference)
        self._values.append(value)
