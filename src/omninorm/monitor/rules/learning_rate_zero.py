"""learning-rate-zero: the learning rates of all groups are 0, so no weight changes.

Signal: the learning rates with which the optimizers made their steps. Persistence [ours], in optimizer steps:
- from the first step on: 3 are a warning, 20 a "fail". A warm-up from 0 has one such step;
- after a learning rate that was not on its way to 0: 2 are a warning, 10 a "fail";
- at the end of a schedule that falls to 0: 20 are a warning. Such a schedule ends with one or a few such steps.
A learning rate was on its way to 0 if it was below 5 % of the largest one, or would have been 0 or less if it had
fallen by as much again. Groups that are frozen with a learning rate of 0 next to others are not reported.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.record.alarm import Alarm

FIRST, SUDDEN, ENDED = (3, 20), (2, 10), (20, None)
SMALL = 0.05


class LearningRateZero(Rule):
    """Reports the whole run."""

    name = "learning-rate-zero"
    source = "exact: the learning rates that the optimizer used; the number of steps is omninorm's own"
    explains = ("no-progress", "updates-lost")

    def __init__(self) -> None:
        self._rates: list[float] = []  # the last two that were not 0, and the largest
        self._largest = 0.0
        self._since, self._count = 0, 0

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        if step.checks is None or not step.checks.stepped or not step.checks.rates:
            return
        rate = max(step.checks.rates)
        if any(step.checks.rates):
            self._rates = [*self._rates[-1:], rate]
            self._largest = max(self._largest, rate)
            self._count = 0
            return
        self._count += 1
        self._since = step.step if self._count == 1 else self._since
        warns, fails = self._patience()
        if self._count >= warns:
            severity = "fail" if fails is not None and self._count >= fails else "warn"
            yield self.alarm(step.step, severity, None, self._evidence(), self._remedy())

    def _ended(self) -> bool:
        """Return whether the learning rate was on its way to 0."""
        if not self._rates:
            return False
        falls = self._rates[-1] < self._rates[0] and 2 * self._rates[-1] - self._rates[0] <= 1e-6 * self._largest
        return falls or self._rates[-1] < SMALL * self._largest

    def _patience(self) -> tuple[int, int | None]:
        return FIRST if not self._rates else ENDED if self._ended() else SUDDEN

    def _evidence(self) -> str:
        before = f", after {self._rates[-1]:.2g}" if self._rates else ""
        return f"Learning rate 0 since step {self._since}{before}: {self._count} steps have changed no weight."

    def _remedy(self) -> str:
        if self._ended():
            return "The schedule has ended: stop, or make it as long as the run."
        return "Check the learning-rate schedule: its length, its warm-up, and how often scheduler.step() is called."
