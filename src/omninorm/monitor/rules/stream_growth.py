"""stream-growth: the residual stream has exploded during training.

Signal: RMS of each block's output. Threshold: 10,000 times its value at the first sample, and at least 10,000, is a
warning; a million times both is a "fail". [ours] With norms the loss may still fall, but the branches drown in such a
stream, and later updates cannot undo it. Trained models have an RMS of up to a few hundred. Persistence: 2 samples.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.monitor.rules.numbers import Streaks, factor, values_of
from omninorm.record.alarm import Alarm

WARN, FAIL = 1e4, 1e6
SAMPLES = 2


class StreamStart:
    """The RMS of each block's output at the first sample, and its growth since then."""

    def __init__(self) -> None:
        self.first: dict[int, float] = {}

    def exploded(self, sample: Sample, limit: float = WARN) -> dict[int, float]:
        """Return the growth in each block whose stream is `limit` times its first value and above `limit`."""
        found = {}
        for block, value in enumerate(values_of(sample, "stream_rms")):
            if value is not None and value > 0.0:
                growth = value / self.first.setdefault(block, value)
                if min(growth, value) >= limit:
                    found[block] = growth
        return found


class StreamGrowth(Rule):
    """Reports the first block whose output has exploded: later blocks inherit it."""

    name = "stream-growth"
    source = "the thresholds, 10,000-fold and a million-fold, are omninorm's own; see docs/watching.md"
    explains = (
        *LOSS_ALARMS,
        "branch-silent",
        "dead-units",
        "depth-growth",
        "eps-share",
        "massive-activation",
        "odd-block",
        "nonfinite",
    )

    def __init__(self) -> None:
        self._start, self._streaks = StreamStart(), Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        exploded = self._start.exploded(sample)
        block = min(exploded, default=None)
        failing = self._streaks.lasts("fail", bool(self._start.exploded(sample, FAIL)), sample.step, SAMPLES)
        if not self._streaks.lasts("warn", block is not None, sample.step, SAMPLES) or block is None:
            return
        name, growth = history.facts.blocks[block], exploded[block]
        value = growth * self._start.first[block]
        evidence = f"The residual stream exploded: its RMS after {name} is {value:.3g}, "
        evidence += f"{factor(growth)} times its value at the first sample."
        remedy = "Lower the learning rate, clip gradients at norm 1.0, and restart from a checkpoint before that; "
        remedy += f"later updates seldom undo it. If updates are below 1 % of the weights, look at what {name} adds."
        yield self.alarm(sample.step, "fail" if failing else "warn", name, evidence, remedy)
