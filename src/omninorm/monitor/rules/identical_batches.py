"""identical-batches: the model gets the same batch in every step.

Signal: a checksum of the model's input tensors in each sampled step and in the step after it. Threshold: none, the
checksums are equal. Persistence: 5 of them, among them those of consecutive steps, so a data set that repeats after as
many batches as there are steps between samples is not mistaken for one batch. It is a warning: training on one batch is
a common test of a training loop.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.alarm import Alarm
from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule

COUNT = 5


class IdenticalBatches(Rule):
    """Reports the whole run."""

    name = "identical-batches"
    source = "exact: checksums of the inputs' bits"

    def __init__(self) -> None:
        self._batch: float | None = None
        self._count, self._first, self._last = 0, 0, 0
        self._consecutive = False

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        batch = None if step.checks is None else step.checks.batch
        if batch is None:
            return
        if batch == self._batch:
            self._count += 1
            self._consecutive = self._consecutive or step.step == self._last + 1
        else:
            self._batch, self._count, self._first, self._consecutive = batch, 1, step.step, False
        self._last = step.step
        if self._count >= COUNT and self._consecutive:
            evidence = (
                f"The same batch in every step: {self._count} checked steps from {self._first} to {step.step} had "
            )
            evidence += "equal inputs."
            remedy = "If this is not a test on a single batch, check that the data loader advances and is shuffled."
            yield self.alarm(step.step, "warn", None, evidence, remedy)
