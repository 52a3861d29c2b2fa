"""Abrupt changes of positive values from one step to the next, for input-scale and embedding-scale."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from omninorm.monitor.rules.numbers import fold, median

KEPT, FEWEST = 32, 4


class Jump(NamedTuple):
    """A value, the median before it jumped, and the step since which it differs."""

    value: float
    before: float
    since: int

    @property
    def fold(self) -> float:
        """The factor between both, at least 1."""
        return max(self.value / self.before, self.before / self.value)

    def words(self, what: str) -> str:
        """Describe the change in a clause that begins with `what`."""
        verb = "rose" if self.value > self.before else "fell"
        return f"{what} {verb} {fold(self.fold)}, from {self.before:.3g} to {self.value:.3g}"


class Jumps:
    """Compares each value of a key with the median of up to 32 values before its jump.

    Args:
        limit: the factor from which a change is a jump.
        steps: the consecutive values that must be beyond it.
    """

    def __init__(self, limit: float, steps: int) -> None:
        self._limit, self._steps = limit, steps
        self._before: dict[str, deque[float]] = {}
        self._since: dict[str, tuple[int, int]] = {}  # the step of a jump, and the number of values since then

    def see(self, key: str, value: float, step: int) -> Jump | None:
        """Add a value; return its jump if it lasts. Values of 0 or that are not finite neither count nor interrupt."""
        if not 0.0 < value < math.inf:
            return None
        before = self._before.setdefault(key, deque(maxlen=KEPT))
        usual = median(list(before)) if len(before) >= FEWEST else value
        if max(value / usual, usual / value) < self._limit:
            self._since.pop(key, None)
            before.append(value)
            return None
        since, count = self._since.get(key, (step, 0))
        self._since[key] = since, count + 1
        return Jump(value, usual, since) if count + 1 >= self._steps else None
