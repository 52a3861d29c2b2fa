"""unrecovered-spike: the loss rose and stays up.

Signal: the loss, against its mean m over the last 128 ordinary steps. High means: at least 2·m (llm-foundry), or half
of what the run had learned is lost, loss ≥ (m + first)/2, where that is a fifth of the first loss or more [ours]:
small models never reach 2·m, since the loss of a model that knows nothing is less than twice theirs.
Persistence: more than 4 steps running is a warning (llm-foundry). More than 64 is a "fail" [ours]: a burst of 20 bad
batches and as many steps to get over it must end as a warning, and a run that is lost does not come back in 64 steps.
While the loss is high, m stands still.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, Step
from omninorm.watch.rules.base import Rule
from omninorm.watch.rules.numbers import finite, fold

FACTOR = 2.0
WARN_STEPS, FAIL_STEPS = 4, 64
WINDOW, FEWEST, FIRST = 128, 16, 4
LEARNED = 0.2  # of the first loss must have been learned before losing half of it counts


class UnrecoveredSpike(Rule):
    """The loss is lost; why is for other rules to say."""

    name = "unrecovered-spike"
    source = "twice the mean for more than 4 steps is llm-foundry's limit; more than 64 steps is omninorm's own"

    def __init__(self) -> None:
        self._ordinary: deque[float] = deque(maxlen=WINDOW)
        self._first: list[float] = []
        self._high = 0

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss = finite(step.loss)
        if loss is None:
            return
        if len(self._first) < FIRST:
            self._first.append(loss)
        mean = self._mean()
        if mean is None or not self._is_high(loss, mean):
            self._high = 0
            self._ordinary.append(loss)
            return
        self._high += 1
        if self._high > WARN_STEPS:
            yield self._explain(step.step, loss, mean)

    def _mean(self) -> float | None:
        return sum(self._ordinary) / len(self._ordinary) if len(self._ordinary) >= FEWEST else None

    def _is_high(self, loss: float, mean: float) -> bool:
        first = sum(self._first) / len(self._first)
        learned = mean > 0.0 and first - mean >= LEARNED * first
        return (mean > 0.0 and loss >= FACTOR * mean) or (learned and loss >= (mean + first) / 2)

    def _explain(self, step: int, loss: float, mean: float) -> Alarm:
        since = step - self._high + 1
        evidence = (
            f"Loss high for {self._high} steps: it has been since step {since}, {loss:.4g}, "
            f"{fold(loss / mean)} its mean before, {mean:.4g}."
        )
        if self._high > FAIL_STEPS:
            remedy = f"Go back to a checkpoint before step {since} and skip its data, or go on with half the rate."
            return self.alarm(step, "fail", None, evidence + " It does not recover.", remedy)
        remedy = f"Look at the batches from step {since} on; if it stays high, go back to a checkpoint before it."
        return self.alarm(step, "warn", None, evidence, remedy)
