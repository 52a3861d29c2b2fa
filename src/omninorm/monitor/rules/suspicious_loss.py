"""suspicious-loss: a language model trained from scratch is far too good far too soon.

Signals: the loss, and log Z of the logits at the first sample. Threshold: within 200 steps, the mean of the newest 5
losses is below a tenth of the first loss. [ours] No text is that predictable: after 200 steps a model of bytes is at a
third of ln(256), and even fully trained ones stay above a tenth. It is a warning, raised only if the model was
untrained, has logits over a vocabulary, and the vocabulary is not tiny: the first loss is known, is at least 3.5 (ln
32) and at most 13 (above, large initial weights add to it), and is within 25 % of mean log Z, as it is when the logits
of the labels are nothing special. Fine-tuning, classification and regression begin lower. Persistence: 5 losses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.no_progress import began_untrained
from omninorm.monitor.rules.numbers import finite
from omninorm.record.alarm import Alarm

SHARE, WITHIN, NEWEST = 0.1, 200, 5


class SuspiciousLoss(Rule):
    """Reports the whole run."""

    name = "suspicious-loss"
    source = "the threshold, a tenth of the first loss within 200 steps, is omninorm's own; see docs/watching.md"

    def __init__(self) -> None:
        self._first: float | None = None
        self._newest: deque[float] = deque(maxlen=NEWEST)

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss = finite(step.loss)
        if loss is None or step.step > WITHIN:
            return
        if step.step == 1:
            self._first = loss
        self._newest.append(loss)
        mean = sum(self._newest) / len(self._newest)
        if self._first is None or len(self._newest) < NEWEST or mean >= SHARE * self._first:
            return
        if began_untrained(history, self._first):
            evidence = f"Suspiciously good: the loss fell from {self._first:.4g} to {mean:.2g} in {step.step} steps."
            remedy = (
                "Unless you overfit a few batches on purpose, change the last token of an input: if the logits of "
                "earlier positions change, the attention is not causal and sees future tokens. Otherwise check that "
                "the loss compares each position with the next token, shifted once, and that the batches differ."
            )
            yield self.alarm(step.step, "warn", None, evidence, remedy)
