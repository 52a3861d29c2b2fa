"""updates-lost: weights of 16 bits do not change although they have a gradient, because of rounding.

Signal: the share of about a thousand weights of each tensor that have a gradient other than 0 and are bit for bit what
they were in an earlier sample. bfloat16 has 8 significant bits: a weight that moves by less than 1/512 to 1/256 of
itself stays where it is, in every step again. With float32 master weights it moves after a few steps.
Threshold: 90 % in half of the groups is a "fail", 50 % a warning [ours]. 90 % of the norms' gains alone are a warning:
they are larger than other weights, so their updates are lost first.
Persistence: 15 steps in which the optimizer moved weights, with a mean learning rate of at least half of the present
one (no warm-up) and at least a tenth of the largest so far (not the end of a schedule).
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.checks.facts import Lost
from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import known, median
from omninorm.record.alarm import Alarm

WARN, FAIL = 0.5, 0.9
STEPS = 15
RISING, ENDING = 0.5, 0.1


class UpdatesLost(Rule):
    """Reports the whole run."""

    name = "updates-lost"
    source = "exact: weights with the same bits as in an earlier sample; the limits of 50 % and 90 % are omninorm's own"
    explains = ("no-progress", "branch-silent", "adam-eps")

    def __init__(self) -> None:
        self._largest = 0.0

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        if step.checks is not None and step.checks.rates:
            self._largest = max(self._largest, *step.checks.rates)
        return ()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        lost = sample.checks.lost
        steps = [] if lost is None else self._steps(history, lost.since, sample.step)
        if lost is None or len(steps) < STEPS or not self._counts(steps):
            return
        shares = known(lost.groups)
        typical = median(shares) if shares else 0.0
        if typical > WARN:
            severity = "fail" if typical >= FAIL else "warn"
            what = f"{100 * typical:.0f} % of the {lost.dtype} weights (in the median group)"
            yield self.alarm(sample.step, severity, None, self._evidence(what, lost, len(steps)), self._remedy(lost))
        elif lost.gains is not None and lost.gains >= FAIL:
            what = f"{100 * lost.gains:.0f} % of the norms' {lost.dtype} gains"
            yield self.alarm(sample.step, "warn", None, self._evidence(what, lost, len(steps)), self._remedy(lost))

    def _steps(self, history: History, since: int, until: int) -> list[float]:
        """Return the learning rates of the steps after `since` in which the optimizer moved weights."""
        found: list[float] = []
        for step in reversed(history.steps):
            if step.step <= since:
                break
            checks = step.checks
            if step.step <= until and checks is not None and checks.stepped and checks.overflowed is None:
                found.append(max(checks.rates, default=0.0))
        return found[::-1]

    def _counts(self, rates: list[float]) -> bool:
        now = rates[-1]
        return now > 0.0 and sum(rates) >= RISING * now * len(rates) and now >= ENDING * self._largest

    @staticmethod
    def _evidence(what: str, lost: Lost, steps: int) -> str:
        return (
            f"Updates are lost to rounding: {what} have a gradient but have not changed since step {lost.since}, in "
            f"{steps} steps."
        )

    @staticmethod
    def _remedy(lost: Lost) -> str:
        return (
            f"Keep the weights in float32 and run the model under torch.autocast, or use an optimizer with float32 "
            f"master weights or stochastic rounding. A higher learning rate moves {lost.dtype} weights, but coarsely."
        )
