"""branch-silent: a block, its attention or its feed-forward adds nothing to the residual stream.

Signals: RMS(F(x))/RMS(x) of the block and of its two parts; RMS of its output. Threshold: a block below 0.01 is a
warning; a block or a part below 1e-6 is dead, a "fail" [ours]. Persistence: a warning after 3 samples over 50 steps;
dead after 3 samples over 10 steps if it had been alive; over 20 if it is exactly 0 from the start, since branches that
start at 0 on purpose (zero-initialized projections, ReZero) leave it with their first update; else after 5 over 50.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import Facts, History, Sample
from omninorm.watch.rules.base import Rule
from omninorm.watch.rules.numbers import Streaks, values_of

WARN, DEAD = 0.01, 1e-6
SIGNALS = ("stream_rms", "branch_ratio", "attention_ratio", "feed_forward_ratio")
Finding = tuple[int, str, float]


class BranchSilent(Rule):
    """Names the attention or feed-forward where that is what is silent, else the block."""

    name = "branch-silent"
    source = "the thresholds, shares of 0.01 and 1e-6, are omninorm's own; see docs/watching.md"
    explains = ("depth-growth", "dead-units", "eps-share", "adam-eps")

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._alive: set[tuple[int, str]] = set()

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
        # Behind a block whose output is 0 everything is silent: the first one is the cause.
        for index, signal, value in sorted(dead, key=lambda found: (found[0], SIGNALS.index(found[1]))):
            yield self._explain(history, sample, index, signal, value)
        blocks = {index for index, _, _ in dead}
        for index, _, value in sorted(weak, key=lambda found: found[2]):
            if index not in blocks:
                block = history.facts.blocks[index]
                evidence = f"{block} adds only {value:.2g} of the residual stream's size to it."
                remedy = "The model would lose little without it: scale norms by 1/√depth (lns), or use fewer blocks."
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
        was = " It has been alive in this run." if (index, signal) in self._alive else ""
        unit = "RMS" if signal == "stream_rms" else "share of the residual stream"
        evidence = f"{what} {layer} is silent: the {unit} of its output is {value:.2g}.{was}"
        remedy = f"Look for a gain, a mask or weights of 0 in {layer}, or for a product that underflows."
        return self.alarm(sample.step, "fail", layer, evidence, remedy)


def _named(facts: Facts, index: int, signal: str) -> tuple[str, str]:
    """The layer's name, and what it is."""
    parts = {
        "attention_ratio": ("The attention", facts.attentions),
        "feed_forward_ratio": ("The feed-forward", facts.feed_forwards),
    }
    what, names = parts.get(signal, ("Block", facts.blocks))
    name = names[index] if index < len(names) else None
    return name or facts.blocks[index], what
