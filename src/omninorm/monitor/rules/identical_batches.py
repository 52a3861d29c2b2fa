"""identical-batches: the model gets the same batch in every step, or every batch several times.

Signal: a checksum of the model's input tensors in each sampled step, in the step after it, and in a third one whose
distance changes with every sample, so that a data set which repeats after as many batches as there are steps between
samples is not mistaken for one batch. Checksums are compared exactly. Persistence [ours]: 5 in a row are equal; 10 in a
row are those of two batches; or in 3 of 4 to 8 pairs of consecutive steps, and in half of these pairs or more, both
steps had the same batch. It is a warning: training on one or two batches is a common test of a training loop, and some
methods use every batch several times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.record.alarm import Alarm

ONE, TWO = 5, 10
REPEATED, FEWEST, PAIRS = 3, 4, 8


class IdenticalBatches(Rule):
    """Reports the whole run."""

    name = "identical-batches"
    source = "exact: checksums of the inputs' bits; the number of steps is omninorm's own"
    explains = ("suspicious-loss", "held-out-rising")

    def __init__(self) -> None:
        self._checked: deque[tuple[int, float]] = deque(maxlen=TWO)
        self._pairs: deque[bool] = deque(maxlen=PAIRS)

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        batch = None if step.checks is None else step.checks.batch
        if batch is None:
            return
        if self._checked and self._checked[-1][0] == step.step - 1:
            self._pairs.append(self._checked[-1][1] == batch)
        self._checked.append((step.step, batch))
        evidence = self._evidence()
        if evidence:
            remedy = (
                "If this is not intended, check that the data loader advances and is shuffled, and that its workers "
            )
            remedy += "do not read the same data."
            yield self.alarm(step.step, "warn", None, evidence, remedy)

    def _evidence(self) -> str | None:
        batches = [batch for _, batch in self._checked]
        first, last = self._checked[0][0], self._checked[-1][0]
        if len(batches) >= ONE and len(set(batches[-ONE:])) == 1:
            first = self._checked[len(batches) - ONE][0]
            return f"The same batch in every step: {ONE} checked steps from {first} to {last} had equal inputs."
        if len(batches) == TWO and len(set(batches)) == 2:
            return f"Only two batches: {TWO} checked steps from {first} to {last} had the inputs of one or the other."
        repeated = sum(self._pairs)
        if len(self._pairs) >= FEWEST and repeated >= REPEATED and 2 * repeated >= len(self._pairs):
            return (
                f"Batches come several times: in {repeated} of {len(self._pairs)} checked pairs of consecutive steps, "
                f"the newest at step {last}, both steps had equal inputs."
            )
        return None
