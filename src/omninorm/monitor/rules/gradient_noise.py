"""gradient-noise: the gradients have become random numbers.

Signal: how much the rows and columns of a gradient differ in size, for 32 × 32 elements of up to 8 matrices in the
blocks, relative to independent normal elements, for which it is about 1. Threshold: the median matrix below 1.6, but
above 0.4 (signs and clipped values are more equal than that), after its median over at least 3 samples was above 5
[ours]: gradients are sums of outer products, and in healthy runs of our
tests the median matrix is never below 10. Only a change counts, because differentially private training adds such noise
on purpose. Noise that keeps the sizes of rows and columns is not detected. Persistence: 2 samples. It is a "fail".
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks
from omninorm.record.alarm import Alarm

EQUAL, RANDOM, ORDERED = 0.4, 1.6, 5.0
FEWEST_MATRICES, FEWEST, KEPT = 3, 3, 16
SAMPLES = 2


class GradientNoise(Rule):
    """Reports the whole run."""

    name = "gradient-noise"
    source = "the limits, 1.6 and 5 times the unevenness of independent elements, are omninorm's own"
    explains = ("no-progress", "loss-rising", "loss-spike", "unrecovered-spike", "gradient-spike", "weights-vanish")

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._before: deque[float] = deque(maxlen=KEPT)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        found = [grid.unevenness for grid in sample.checks.grids if grid.zeros < 1.0]
        if len(found) < FEWEST_MATRICES:
            return
        value = statistics.median(found)
        usual = statistics.median(self._before) if len(self._before) >= FEWEST else 0.0
        holds = EQUAL < value < RANDOM and usual > ORDERED
        if not holds:
            self._before.append(value)
        if self._streaks.lasts("", holds, sample.step, SAMPLES):
            evidence = (
                f"Gradients look like random numbers: their rows and columns are as equal in size as those of "
                f"independent numbers ({value:.2g} times their variance, before it was {usual:.3g} times)."
            )
            remedy = (
                "Look at what writes to gradients after the backward pass: a buffer that is reused before a reduction "
                "has finished, communication on another stream without waiting, or noise that is added to them. "
                "Compare the gradient of one batch with that of a single process without these."
            )
            yield self.alarm(sample.step, "fail", None, evidence, remedy)
