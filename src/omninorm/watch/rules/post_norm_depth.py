"""post-norm-depth: in a deep post-norm model the gradient vanishes on its way to the first block.

Signals: the placement; the stream's gradient over depth; the learning rate's first values. Threshold: 12 blocks or
more in post-norm, and less than a hundredth of the last block's gradient arrives at the first. [ours] A deep post-
norm model starts with a gradient that grows towards the first block; steps that are too large at first destroy its
norms' balance, the gradient vanishes, and the loss stays where a model without attention would be.
Persistence: 2 samples over 5 steps. A warm-up is visible if the first rate was less than half of the largest so far.
Source: Xiong et al., arXiv 2002.04745, for why it needs a warm-up.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, Sample, Step
from omninorm.watch.rules.base import Rule
from omninorm.watch.rules.depth import backward_growth
from omninorm.watch.rules.numbers import Streaks, finite, fold

DEPTH = 12
VANISHED = 0.01
SAMPLES, STEPS = 2, 5


class PostNormDepth(Rule):
    """Names the placement, and the missing warm-up where it is missing."""

    name = "post-norm-depth"
    source = "why post-norm needs a warm-up: Xiong et al., arXiv 2002.04745; the limit of a hundredth is omninorm's own"
    explains = ("depth-growth", "adam-eps", "adam-underestimation", "learning-rate", "unrecovered-spike", "no-progress")

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._first: tuple[int, float] | None = None  # step and rate
        self._largest = 0.0

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        rate = finite(step.lr)
        if rate is not None:
            self._first = self._first or (step.step, rate)
            self._largest = max(self._largest, rate)
        return ()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        depth = len(history.facts.blocks)
        found = backward_growth(sample)
        if history.placement != "post" or depth < DEPTH or found is None:
            return
        if self._streaks.lasts("vanished", found.ratio < VANISHED, sample.step, SAMPLES, STEPS):
            evidence = f"Post-norm with {depth} blocks: the gradient shrinks {fold(found.total)} on "
            evidence += "its way from the last block to the first, whose weights hardly learn from the data any more."
            evidence += self._warm_up()
            remedy = "Start again with pre-norm, or with a warm-up and a quarter of the learning rate."
            if self._warmed():
                remedy = "Start again with pre-norm, or with a quarter of the learning rate and a longer warm-up."
            yield self.alarm(sample.step, "fail", None, evidence, remedy)

    def _warmed(self) -> bool:
        return self._first is not None and self._first[1] < self._largest / 2

    def _warm_up(self) -> str:
        if self._first is None or self._first[0] != 1:  # the rates are not known, or not from the start
            return ""
        return f" The run began {'with a' if self._warmed() else 'without'} warm-up, at a rate of {self._first[1]:.2g}."
