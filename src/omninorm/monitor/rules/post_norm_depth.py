"""post-norm-depth: in a deep post-norm model the gradient vanishes on its way to the first block.

Signals: the placement; the stream's gradient over depth; the first learning rates. Threshold: 12 or more post-norm
blocks, and less than a hundredth of the last block's gradient reaches the first. [ours] At initialization, the
gradient of a deep post-norm model grows towards the first block. Updates that are too large at the beginning destroy
the balance of the norms, the gradient vanishes, and the loss stays at that of a model without attention.
Persistence: 2 samples over 5 steps. The run has a warm-up if its first learning rate is less than half of the largest
so far.
Source: Xiong et al., arXiv 2002.04745, for why post-norm needs a warm-up.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.monitor.rules.depth import backward_growth
from omninorm.monitor.rules.numbers import Streaks, finite, fold
from omninorm.record.alarm import Alarm

DEPTH = 12
VANISHED = 0.01
SAMPLES, STEPS = 2, 5


class PostNormDepth(Rule):
    """Reports the placement, and the warm-up if it is missing."""

    name = "post-norm-depth"
    source = "why post-norm needs a warm-up: Xiong et al., arXiv 2002.04745; the limit of a hundredth is omninorm's own"
    explains = (*LOSS_ALARMS, "depth-growth", "adam-eps", "adam-underestimation", "learning-rate", "no-progress")

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._first: tuple[int, float] | None = None  # step and learning rate
        self._largest = 0.0

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        rate = finite(step.lr)
        if rate is not None:
            self._first = self._first or (step.step, rate)
            self._largest = max(self._largest, rate)
        return ()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        found = backward_growth(sample, history.facts)
        if history.placement != "post" or found is None or found.blocks < DEPTH:
            return
        depth = found.blocks
        if self._streaks.lasts("vanished", found.ratio < VANISHED, sample.step, SAMPLES, STEPS):
            evidence = f"Post-norm with {depth} blocks: the gradient shrinks {fold(found.total)} from the last block "
            evidence += "to the first, whose weights barely learn from the data."
            evidence += self._warm_up()
            remedy = "Restart with pre-norm, or with a warm-up and a quarter of the learning rate."
            if self._warmed():
                remedy = "Restart with pre-norm, or with a longer warm-up and a quarter of the learning rate."
            yield self.alarm(sample.step, "fail", None, evidence, remedy)

    def _warmed(self) -> bool:
        return self._first is not None and self._first[1] < self._largest / 2

    def _warm_up(self) -> str:
        if self._first is None or self._first[0] != 1:  # the learning rates are unknown, or the first ones are
            return ""
        how = "with" if self._warmed() else "without"
        return f" The run started {how} a warm-up, at learning rate {self._first[1]:.2g}."
