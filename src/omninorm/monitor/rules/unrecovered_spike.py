"""unrecovered-spike: the loss rose and stays up.

Signal: the loss, compared with its mean m over the last 128 ordinary steps. High means at least 2·m (llm-foundry), or
that half of the progress is lost, loss ≥ (m + first)/2, if the progress was at least a fifth of the first loss [ours]:
small models never reach 2·m, because the loss of an untrained model is less than twice theirs.
Persistence: more than 4 consecutive steps is a warning (llm-foundry). More than 64 is a "fail" [ours]: a burst of 20
bad batches with as many steps to recover must remain a warning, and a run that has diverged does not return within 64
steps. While the loss is high, m is not updated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import factor, finite
from omninorm.record.alarm import Alarm

FACTOR = 2.0
WARN_STEPS, FAIL_STEPS = 4, 64
WINDOW, FEWEST, FIRST = 128, 16, 4
LEARNED = 0.2  # progress, as a share of the first loss, from which on losing half of it counts


class UnrecoveredSpike(Rule):
    """Reports the whole run. Other rules report the cause."""

    name = "unrecovered-spike"
    source = "twice the mean for more than 4 steps is llm-foundry's limit; more than 64 steps is omninorm's own"
    symptom = True
    explains = ("loss-rising",)

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
            f"Loss high for {self._high} steps: it rose at step {since} and is now {loss:.4g}, "
            f"{factor(loss / mean)} times its earlier mean ({mean:.4g})."
        )
        if self._high > FAIL_STEPS:
            remedy = f"Resume from a checkpoint before step {since} and skip the data of that step. If the loss rises "
            remedy += "again on other data, halve the learning rate."
            return self.alarm(step, "fail", None, evidence + " It has not recovered.", remedy)
        remedy = f"If the loss stays high, resume from a checkpoint before step {since} and skip the data of that step."
        return self.alarm(step, "warn", None, evidence, remedy)
