"""attention-logits: a block's attention logits grow without bound.

Signal: the largest logit, max |q·k|/√d_head. Threshold: 1e3 is a warning, 1e4 a "fail": every run of Wortsman et al.
that passed 1e4 diverged. A softmax is one-hot long before that, so growth counts as well [ours]: above 100, a 3-fold
increase over 3 or more consecutive rises, counted from 20 on, is a warning; growth that would reach 1e4 within as many
further samples is a "fail". Persistence: 2 samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule, layer_names
from omninorm.monitor.rules.numbers import Streaks, earlier, factor, finite
from omninorm.record.alarm import Alarm
from omninorm.record.signals import Limit

SIGNAL = "attention_logit"
WARN, FAIL = 1e3, 1e4
SUSPECT, GROWTH, SAMPLES, RISES = 100.0, 3.0, 8, 3
SMALL = 20.0  # logits this small are harmless, and initial ones are near 0: growth counts from here
PERSISTENCE = 2


class AttentionLogits(Rule):
    """Compares each block with the two limits and with its own past."""

    name = "attention-logits"
    source = "the limits 1e3 and 1e4 are from Wortsman et al., arXiv 2309.14322; the growth criterion is omninorm's own"
    explains = (*LOSS_ALARMS, "attention-entropy", "layer-jump", "learning-rate", "odd-block", "nonfinite")

    def __init__(self) -> None:
        self._streaks = Streaks()

    def limits(self) -> Sequence[Limit]:
        return (Limit(SIGNAL, self.name, WARN, FAIL),)

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
        """Return the growth since the lowest of the last 8 samples if every sample rose; 1 for fewer than 3 rises."""
        past = earlier(history, SIGNAL, index, SAMPLES) if value > SUSPECT else []
        if not past or min(past) <= 0.0:
            return 1.0
        rising = [*past[past.index(min(past)) :], value]
        rose = all(old < new for old, new in pairwise(rising))
        return value / max(rising[0], SMALL) if rose and len(rising) > RISES else 1.0

    @staticmethod
    def _judge(value: float, growth: float) -> tuple[bool, bool]:
        grows = value > SUSPECT and growth > GROWTH
        return value > WARN or grows, value > FAIL or (grows and value * growth > FAIL)

    def _explain(self, history: History, sample: Sample, index: int, value: float, failed: bool) -> Alarm:
        block = history.facts.blocks[index]
        evidence = f"Attention logits too large: the largest in {block} is {value:.3g}"
        growth = self._growth(history, index, value)
        if growth > GROWTH:
            evidence += (
                f", at least {factor(growth)} times its lowest value in the last {SAMPLES} samples and still rising"
            )
        evidence += ". The softmax saturates on single tokens and its gradient vanishes."
        remedy = "Use qk-norm, or weight decay and a lower learning rate for the query and key projections."
        return self.alarm(sample.step, "fail" if failed else "warn", block, evidence, remedy)
