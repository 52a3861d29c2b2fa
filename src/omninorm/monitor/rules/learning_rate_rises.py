"""learning-rate-rises: a cosine schedule has passed its end, and the learning rate rises again.

Signal: the largest learning rate among the groups. Threshold: after a fall over 10 steps or more, to a fifth of its
peak or less, it has risen in 10 steps or more by 2 % of the peak, without ever falling, and as a cosine does: half-way
since the lowest learning rate it had risen by 15 to 35 % of that. A cosine rises by a quarter, a new linear warm-up by
half, and a warm restart jumps. [ours] It is a warning, because a few schedules are periodic on purpose. Persistence: as
given above.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.monitor.rules.numbers import finite
from omninorm.record.alarm import Alarm

LOW, RISE = 0.2, 0.02  # of the peak
STEPS = 10
QUADRATIC = (0.15, 0.35)
MOST = 128  # learning rates kept since the lowest one


class LearningRateRises(Rule):
    """Reports the whole run."""

    name = "learning-rate-rises"
    source = "the limits, a rise by 2 % of the peak after a fall to 20 %, are omninorm's own"
    explains = (*LOSS_ALARMS, "no-progress")

    def __init__(self) -> None:
        self._peak = (0, 0.0)  # the step and the learning rate
        self._rates: list[tuple[int, float]] = []  # since the lowest one after the peak
        self._stride, self._falls_again = 1, False

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        rate = finite(step.lr)
        if rate is None or rate < 0.0:
            return
        if rate >= self._peak[1]:
            self._peak = step.step, rate
            self._rates = []
        if not self._rates or rate <= self._rates[0][1]:
            self._rates, self._stride, self._falls_again = [(step.step, rate)], 1, False
            return
        self._falls_again |= rate < self._rates[-1][1]
        self._keep(step.step, rate)
        if not self._falls_again and self._is_past_its_end(step.step, rate):
            yield self._explain(step.step, rate)

    def _keep(self, step: int, rate: float) -> None:
        """Remember a learning rate, in longer and longer steps."""
        if step - self._rates[-1][0] >= self._stride:
            self._rates.append((step, rate))
        if len(self._rates) > MOST:
            self._rates, self._stride = self._rates[::2], 2 * self._stride

    def _is_past_its_end(self, step: int, rate: float) -> bool:
        (since, low), (top, peak) = self._rates[0], self._peak
        if since - top < STEPS or step - since < STEPS or low > LOW * peak or rate - low < RISE * peak:
            return False
        middle = (since + step) / 2
        half = min(self._rates, key=lambda pair: abs(pair[0] - middle))[1]
        return QUADRATIC[0] <= (half - low) / (rate - low) <= QUADRATIC[1]

    def _explain(self, step: int, rate: float) -> Alarm:
        (since, low), (top, peak) = self._rates[0], self._peak
        evidence = (
            f"Learning rate rises again: it fell from {peak:.3g} at step {top} to {low:.3g} at step {since}, and is "
            f"{rate:.3g} now, as a cosine after its end."
        )
        remedy = (
            "If this is not intended, make the schedule as long as the run (T_max, num_training_steps), and check how "
            "often scheduler.step() is called: once per optimizer step."
        )
        return self.alarm(step, "warn", None, evidence, remedy)
