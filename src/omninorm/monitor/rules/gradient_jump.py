"""gradient-jump: the gradient grows or shrinks abruptly on its way back through one block.

Signal: RMS of the gradient at a block's output relative to that at the output of the block before it, alone and
multiplied by the RMS of the stream. In a model with norms the gradient is as much larger as the stream is smaller, so
a block that legitimately scales the stream changes the first but not the second. Threshold: both change 30-fold for a
warning and 100-fold for a "fail", and 10 times more than in the median block. [ours] The first block is not judged,
because the gradient at its input is not measured. Persistence: 3 samples over 10 steps.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from omninorm.monitor.history import Facts, History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, factor, values_of
from omninorm.record.alarm import Alarm

WARN, FAIL, OTHERS = 30.0, 100.0, 10.0
SAMPLES, STEPS = 3, 10
MOST = 700.0  # the largest logarithm of a number


class Passage(NamedTuple):
    """The logarithm of the factor by which the gradient changes on its way back through a block: of its RMS, and of its
    RMS times that of the stream."""

    block: int
    alone: float
    relative: float

    @property
    def size(self) -> float:
        """The smaller of both, without its sign; 0 if they have opposite directions."""
        return min(abs(self.alone), abs(self.relative)) if self.alone * self.relative > 0.0 else 0.0


class GradientJump(Rule):
    """Reports the block."""

    name = "gradient-jump"
    source = "the thresholds, 30-fold and 100-fold, are omninorm's own"
    explains = (
        *("gradient-clipped", "depth-growth", "adam-eps", "odd-block"),
        *("no-progress", "learning-rate", "no-gradient"),
    )

    def __init__(self) -> None:
        self._streaks = Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        for chain in history.facts.chains or [tuple(range(len(history.facts.blocks)))]:
            found = list(_passages(sample, chain))
            for passage in found:
                usual = math.log(OTHERS) + _usual(found)
                warned, failed = (
                    self._streaks.lasts(
                        (passage.block, fold), passage.size >= max(math.log(fold), usual), sample.step, SAMPLES, STEPS
                    )
                    for fold in (WARN, FAIL)
                )
                if warned:
                    yield self._explain(history.facts, sample, passage, "fail" if failed else "warn")

    def _explain(self, facts: Facts, sample: Sample, passage: Passage, severity: str) -> Alarm:
        block, before = facts.blocks[passage.block], facts.blocks[passage.block - 1]
        grows = passage.alone > 0.0
        times = f"{factor(math.exp(min(abs(passage.alone), MOST)))} times {'larger' if grows else 'smaller'}"
        evidence = (
            f"Gradient {'explodes' if grows else 'vanishes'} in {block}: it is {times} before this block than after "
            "it, although the residual stream is not on another scale."
        )
        remedy = (
            f"Look for code that scales gradients in {block} or between it and {before}: a custom autograd function, a "
            "hook on a tensor, or a division by a tiny number. "
        )
        if grows:
            remedy += "Clipping hides it: it then shrinks the gradients of all other blocks."
        else:
            remedy += f"{before} and everything before it hardly train."
        return self.alarm(sample.step, severity, block, evidence, remedy)


def _passages(sample: Sample, chain: Iterable[int]) -> Iterator[Passage]:
    """Yield the change of the gradient through each block of a chain but the first."""
    gradients, streams = values_of(sample, "stream_grad"), values_of(sample, "stream_rms")
    places = [at for at in chain if at < min(len(gradients), len(streams))]
    for before, block in itertools.pairwise(places):
        numbers = gradients[before], gradients[block], streams[before], streams[block]
        if any(number is None or number <= 0.0 for number in numbers):
            continue
        logs = [math.log(number) for number in numbers if number is not None]
        yield Passage(block, logs[0] - logs[1], logs[0] + logs[2] - logs[1] - logs[3])


def _usual(found: list[Passage]) -> float:
    """Return the logarithm of the change in the median block; 0 if there is nothing to compare with."""
    return statistics.median_low([abs(passage.alone) for passage in found]) if len(found) > 1 else 0.0
