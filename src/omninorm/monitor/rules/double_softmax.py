"""double-softmax: cross entropy receives probabilities, to which it applies softmax again.

Fact: in a sampled step each row that `torch.nn.functional.cross_entropy` receives is ≥ 0 and sums to 1 (within 1e-3; at
most 64 rows are checked). Logits never do. Log-probabilities are harmless, because their softmax restores them.
Persistence: 2 samples. With probabilities from 0 to 1 as logits the loss cannot fall by more than about 1, and its
gradients are tiny: it is a warning, and a "fail" if the mean loss of the newest 20 steps is within 2 % of that of the
first 5. [ours]
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, finite
from omninorm.record.alarm import Alarm

SAMPLES = 2
FIRST, NEWEST, UNCHANGED = 5, 20, 0.02


class DoubleSoftmax(Rule):
    """Reports the whole run."""

    name = "double-softmax"
    source = "the documentation of torch.nn.CrossEntropyLoss: it expects unnormalized logits"
    explains = ("no-progress", "learning-rate")

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._first: list[float] = []

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss = finite(step.loss)
        if loss is not None and len(self._first) < FIRST:
            self._first.append(loss)
        return ()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        if sample.probabilities is None:
            return
        if not self._streaks.lasts("run", sample.probabilities == 1.0, sample.step, SAMPLES):
            return
        evidence = "Softmax is applied before cross_entropy, which applies it again: each row it received is >= 0 and "
        evidence += f"sums to 1, in {SAMPLES} or more samples."
        remedy = "Pass logits to cross_entropy: remove the softmax, or use nll_loss with log_softmax."
        stuck = self._stuck(history)
        if stuck is not None:
            evidence += f" The loss was {stuck[0]:.4g} at the start and is {stuck[1]:.4g} now."
        yield self.alarm(sample.step, "warn" if stuck is None else "fail", None, evidence, remedy)

    def _stuck(self, history: History) -> tuple[float, float] | None:
        """Return the mean loss of the first and of the newest steps, if they are about equal."""
        newest = [finite(step.loss) for step in islice(reversed(history.steps), NEWEST)]
        losses = [loss for loss in newest if loss is not None]
        if len(losses) < NEWEST or len(history.steps) < NEWEST + FIRST or len(self._first) < FIRST:
            return None
        start, now = sum(self._first) / FIRST, sum(losses) / NEWEST
        return (start, now) if abs(now - start) <= UNCHANGED * abs(start) else None
