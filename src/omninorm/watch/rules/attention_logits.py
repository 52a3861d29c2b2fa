"""attention-logits: the logits of a block's attention grow without bound.

Signal: the largest logit, max |q·k|/√d_head. Threshold: 1e3 is a warning, 1e4 a "fail": every run of Wortsman et al.
that passed 1e4 diverged. A softmax is one-hot long before, so growth counts too [ours]: beyond 100 and 3-fold in 3 or
more rises running is a warning, on the way to 1e4 within as many samples again a "fail". Persistence: 2 samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, Sample
from omninorm.watch.rules.base import Rule, layer_names
from omninorm.watch.rules.numbers import Streaks, earlier, finite, fold

SIGNAL = "attention_logit"
WARN, FAIL = 1e3, 1e4
SUSPECT, GROWTH, SAMPLES, RISES = 100.0, 3.0, 8, 3
PERSISTENCE = 2


class AttentionLogits(Rule):
    """Compares each block with the two limits, and with its own past."""

    name = "attention-logits"
    source = "the limits 1e3 and 1e4 are from Wortsman et al., arXiv 2309.14322; to judge growth is omninorm's own"
    explains = ("attention-entropy", "layer-jump", "learning-rate", "unrecovered-spike")

    def __init__(self) -> None:
        self._streaks = Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        names = layer_names(history.facts, SIGNAL)
        found: list[tuple[bool, float, int]] = []
        for index, number in enumerate(sample.signals.get(SIGNAL, ())):
            value = finite(number)
            if value is None or index >= len(names):
                continue
            warns, fails = self._judge(value, self._growth(history, index, value))
            warned = self._streaks.lasts((index, "warn"), warns, sample.step, PERSISTENCE)
            failed = self._streaks.lasts((index, "fail"), fails, sample.step, PERSISTENCE)
            if warned or failed:
                found.append((failed, value, index))
        for failed, value, index in sorted(found, reverse=True):
            yield self._explain(history, sample, index, value, failed)

    @staticmethod
    def _growth(history: History, index: int, value: float) -> float:
        """By what factor it rose since its lowest among the last 8, at every sample; 1 below 3 rises."""
        past = earlier(history, SIGNAL, index, SAMPLES) if value > SUSPECT else []
        if not past or min(past) <= 0.0:
            return 1.0
        rising = [*past[past.index(min(past)) :], value]
        rose = all(old < new for old, new in pairwise(rising))
        return value / rising[0] if rose and len(rising) > RISES else 1.0

    @staticmethod
    def _judge(value: float, growth: float) -> tuple[bool, bool]:
        grows = value > SUSPECT and growth > GROWTH
        return value > WARN or grows, value > FAIL or (grows and value * growth > FAIL)

    def _explain(self, history: History, sample: Sample, index: int, value: float, failed: bool) -> Alarm:
        block = history.facts.blocks[index]
        evidence = f"Attention logits too large: the largest of {block} is {value:.3g}"
        growth = self._growth(history, index, value)
        if growth > GROWTH:
            evidence += f", {fold(growth)} what it was up to {SAMPLES} samples before, and rising"
        evidence += "; its softmax picks single tokens, and its gradient vanishes."
        remedy = "Use qk-norm, or weight decay and a lower learning rate on the query and key projections."
        return self.alarm(sample.step, "fail" if failed else "warn", block, evidence, remedy)
