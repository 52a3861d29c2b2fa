"""steps-skipped: backward passes run, but the optimizer does not change the weights.

Signals: whether an optimizer made a step, and, with a GradScaler, whether scaled gradients were not finite, so that
the scaler skipped it. Persistence [ours]:
- a GradScaler that skips 3 steps in a row is a warning, 20 a "fail". At the beginning it searches for its scale, from
  65536 downwards: up to 12 skipped steps are healthy there;
- an optimizer that never makes a step in 20 steps is a warning, in 100 a "fail": `Watch.step` may be called for each
  micro-batch. Later it takes four times as many steps as the longest pause before.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import factor
from omninorm.record.alarm import Alarm

SEARCH, WARN, FAIL = 12, 3, 20
PAUSE, LONG_PAUSE = 20, 100
LONGER = 4


class StepsSkipped(Rule):
    """Reports the parameter at which an overflow starts, or the whole run."""

    name = "steps-skipped"
    source = "exact: the optimizer's steps and the scaled gradients; the number of steps is omninorm's own"
    explains = ("no-progress", "updates-lost", "unrecovered-spike")

    def __init__(self) -> None:
        self._skipped = self._paused = self._longest = 0
        self._stepped = False
        self._where: str | None = None

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        checks = step.checks
        if checks is None or not checks.optimizer or not checks.received:
            return ()
        if checks.overflowed is not None:
            self._skipped, self._where = self._skipped + 1, checks.overflowed
        elif checks.stepped:
            self._longest = max(self._longest, self._paused)
            self._skipped = self._paused = 0
            self._stepped = True
        else:
            self._paused = 0 if checks.moved else self._paused + 1
        return ()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        if self._skipped >= (WARN if self._stepped else SEARCH + 1):
            yield self._explain_skipped(sample)
        limit = LONGER * self._longest
        if self._paused >= max(PAUSE, limit):
            severity = "fail" if self._paused >= max(LONG_PAUSE, limit) else "warn"
            evidence = f"optimizer.step() was not called in the last {self._paused} steps, so no weight changes."
            remedy = "Call optimizer.step() after the backward pass, and pass the optimizers that are used to watch. "
            remedy += "With gradient accumulation, call Watch.step once per optimizer step."
            yield self.alarm(sample.step, severity, None, evidence, remedy)

    def _explain_skipped(self, sample: Sample) -> Alarm:
        scale = sample.checks.scale
        at = "" if scale is None else f" at a scale of {factor(scale)}"
        evidence = f"The GradScaler has skipped the last {self._skipped} steps{at}: gradients are not finite from "
        evidence += f"{self._where} on, backwards."
        remedy = f"Look for an overflow in or after {self._where}, use bfloat16, or run that part in float32. If the "
        remedy += "scale is far above 65536, start with a smaller one."
        return self.alarm(sample.step, "fail" if self._skipped >= FAIL else "warn", self._where, evidence, remedy)
