"""branch-silent: a block, its attention or its feed-forward adds nothing to the residual stream.

Signals: RMS(F(x))/RMS(x) of the block and of its two parts; RMS of its output. Threshold: a block below 0.01 is a
warning; a block or a part below 1e-6 is dead, a "fail" [ours]. Persistence: 3 samples over 50 steps for a warning. For
a "fail", 3 samples over 10 steps if the branch had contributed before; over 20 steps if it has been exactly 0 from the
beginning, because branches initialized to 0 on purpose (zero-initialized projections, ReZero) leave 0 with their first
update; otherwise 5 samples over 50 steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.alarm import Alarm
from omninorm.monitor.history import Facts, History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, values_of
from omninorm.record.signals import Limit

WARN, DEAD = 0.01, 1e-6
SIGNALS = ("stream_rms", "branch_ratio", "attention_ratio", "feed_forward_ratio")
Finding = tuple[int, str, float]


class BranchSilent(Rule):
    """Reports the attention or the feed-forward if only that is silent, otherwise the block."""

    name = "branch-silent"
    source = "the thresholds, shares of 0.01 and 1e-6, are omninorm's own; see docs/watching.md"
    explains = ("depth-growth", "dead-units", "eps-share", "adam-eps")

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._alive: set[tuple[int, str]] = set()

    def limits(self) -> Sequence[Limit]:
        parts = [Limit(signal, self.name, None, DEAD, below=True) for signal in SIGNALS if signal != "branch_ratio"]
        return (Limit("branch_ratio", self.name, WARN, DEAD, below=True), *parts)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        dead: list[Finding] = []
        weak: list[Finding] = []
        for signal in SIGNALS:
            for index, value in enumerate(values_of(sample, signal)):
                if value is not None and index < len(history.facts.blocks):
                    if self._is_dead((index, signal), value, sample.step):
                        dead.append((index, signal, value))
                    if signal == "branch_ratio" and self._is_weak(index, value, sample.step):
                        weak.append((index, signal, value))
        # After a block whose output is 0 everything is silent, so the first one is the cause.
        for index, signal, value in sorted(dead, key=lambda found: (found[0], SIGNALS.index(found[1]))):
            yield self._explain(history, sample, index, signal, value)
        blocks = {index for index, _, _ in dead}
        for index, _, value in sorted(weak, key=lambda found: found[2]):
            if index not in blocks:
                block = history.facts.blocks[index]
                evidence = f"{block} changes the residual stream by only {value:.2g} of its RMS."
                remedy = "The block contributes almost nothing. Scale the norms by 1/√depth (lns), or use fewer blocks."
                yield self.alarm(sample.step, "warn", block, evidence, remedy)

    def _is_dead(self, key: tuple[int, str], value: float, step: int) -> bool:
        if value > DEAD:
            self._alive.add(key)
        samples, steps = (3, 10) if key in self._alive else (5, 50)
        zero = self._streaks.lasts((*key, "zero"), value == 0.0, step, 3, 20)
        return self._streaks.lasts(key, value <= DEAD, step, samples, steps) or zero

    def _is_weak(self, index: int, value: float, step: int) -> bool:
        return self._streaks.lasts((index, "weak"), value < WARN, step, 3, 50)

    def _explain(self, history: History, sample: Sample, index: int, signal: str, value: float) -> Alarm:
        layer, what = _named(history.facts, index, signal)
        was = " It contributed earlier in this run." if (index, signal) in self._alive else ""
        unit = "" if signal == "stream_rms" else " relative to the residual stream"
        evidence = f"{what} {layer} is silent: the RMS of its output{unit} is {value:.2g}.{was}"
        remedy = f"Check {layer} for a gain, a mask or weights equal to 0, or for a product that underflows."
        return self.alarm(sample.step, "fail", layer, evidence, remedy)


def _named(facts: Facts, index: int, signal: str) -> tuple[str, str]:
    """Return the layer's name and its kind."""
    parts = {
        "attention_ratio": ("Attention", facts.attentions),
        "feed_forward_ratio": ("Feed-forward", facts.feed_forwards),
    }
    what, names = parts.get(signal, ("Block", facts.blocks))
    name = names[index] if index < len(names) else None
    return name or facts.blocks[index], what
