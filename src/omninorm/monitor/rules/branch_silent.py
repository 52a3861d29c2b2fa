"""branch-silent: a block, its attention or its feed-forward adds nothing to the residual stream, or a norm went silent.

Signals: RMS(F(x))/RMS(x) of the block and of its two parts; RMS of its output; the norms' largest gains. Threshold:
- Dead: below 1e-6 is a "fail". Persistence: 3 samples over 10 steps if the branch had contributed before; over 20 steps
  if it has been exactly 0 from the beginning, because branches initialized to 0 on purpose (zero-initialized
  projections, ReZero) leave 0 with their first update; otherwise 5 samples over 50 steps.
- Fallen: a part below 0.05 that had been 10 times larger (median of up to 8 samples before the fall), while the same
  part of the median block fell less than 2-fold, is a "fail". Persistence: 3 samples over 10 steps.
- Weak: a block below 0.01, or a part below 0.01 that is a tenth of the median block's, is a warning, unless it has
  doubled meanwhile: branches that begin at 0 grow. Persistence: 3 samples over 50 steps.
- A block whose stream has exploded (see stream-growth) is not judged: its branches are small only relative to that.
- Gains whose largest fell 10-fold from one sample to the next, while those of the median norm fell less than 2-fold,
  are a "fail" at once: training changes them by about the learning rate per step. [ours]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.history import Facts, History, Sample
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.monitor.rules.numbers import Streaks, earlier, fold, known, median, value_at, values_of
from omninorm.monitor.rules.stream_growth import StreamStart
from omninorm.record.alarm import Alarm
from omninorm.record.signals import Limit

WARN, DEAD, SMALL = 0.01, 1e-6, 0.05
FELL, OTHERS, GROWN = 10.0, 2.0, 2.0
PAST, FEWEST = 8, 3
PARTS = ("attention_ratio", "feed_forward_ratio")
SIGNALS = ("stream_rms", "branch_ratio", *PARTS)
Finding = tuple[int, str, float]
Key = tuple[int, str]


class BranchSilent(Rule):
    """Reports the attention or the feed-forward if only that is silent, otherwise the block; or the norm."""

    name = "branch-silent"
    source = "the thresholds, shares of 0.01 and 1e-6 and a 10-fold fall, are omninorm's own; see docs/watching.md"
    explains = (
        *LOSS_ALARMS,
        "depth-growth",
        "dead-units",
        "eps-share",
        "adam-eps",
        "odd-block",
        "gain-drift",
        "no-progress",
        "no-gradient",
    )

    def __init__(self) -> None:
        self._streaks, self._stream = Streaks(), StreamStart()
        self._alive: set[Key] = set()
        self._before: dict[Key, float] = {}  # the level before a fall
        self._weak: dict[Key, float] = {}  # the value when a weak branch was first seen
        self._gains: dict[int, tuple[float, int]] = {}  # the largest gain before a fall, and the step of the fall

    def limits(self) -> Sequence[Limit]:
        parts = [Limit(signal, self.name, None, DEAD, below=True) for signal in SIGNALS if signal != "branch_ratio"]
        return (Limit("branch_ratio", self.name, WARN, DEAD, below=True), *parts)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        yield from self._fallen_gains(history, sample)
        dead: list[Finding] = []
        fallen: list[Finding] = []
        weak: list[Finding] = []
        exploded = self._stream.exploded(sample)
        for signal in SIGNALS:
            values = values_of(sample, signal)
            numbers = known(values)
            for index, value in enumerate(values[: len(history.facts.blocks)]):
                if value is None or index in exploded:
                    continue
                if self._is_dead((index, signal), value, sample.step):
                    dead.append((index, signal, value))
                elif signal in PARTS and self._has_fallen(history, sample, (index, signal), value):
                    fallen.append((index, signal, value))
                if signal != "stream_rms" and self._is_weak((index, signal), value, numbers, sample.step):
                    weak.append((index, signal, value))
        yield from self._report(history, sample, dead, fallen, weak)

    def _report(
        self, history: History, sample: Sample, dead: list[Finding], fallen: list[Finding], weak: list[Finding]
    ) -> Iterable[Alarm]:
        # After a block whose output is 0 everything is silent, so the first one is the cause.
        for index, signal, value in sorted(dead, key=lambda found: (found[0], SIGNALS.index(found[1]))):
            yield self._explain(history, sample, index, signal, value)
        blocks = {index for index, _, _ in dead}
        for index, signal, value in fallen:
            if index not in blocks:
                yield self._explain(history, sample, index, signal, value)
        blocks |= {index for index, _, _ in fallen}
        for index, signal, value in sorted(weak, key=lambda found: found[2]):
            if index not in blocks:
                layer, what = _named(history.facts, index, signal)
                evidence = f"{what} {layer} changes the residual stream by only {value:.2g} of its RMS."
                remedy = "It contributes almost nothing. Scale the norms by 1/√depth (lns), or use fewer blocks."
                if signal in PARTS or FELL * value <= median(known(values_of(sample, signal))):
                    part = (
                        "The same part of the other blocks contributes"
                        if signal in PARTS
                        else "The other blocks contribute"
                    )
                    remedy = f"{part} more. Compare the initialization and the input norm of {layer} with theirs."
                yield self.alarm(sample.step, "warn", layer, evidence, remedy)

    def _is_dead(self, key: Key, value: float, step: int) -> bool:
        if value > DEAD:
            self._alive.add(key)
        samples, steps = (3, 10) if key in self._alive else (5, 50)
        zero = self._streaks.lasts((*key, "zero"), value == 0.0, step, 3, 20)
        return self._streaks.lasts(key, value <= DEAD, step, samples, steps) or zero

    def _has_fallen(self, history: History, sample: Sample, key: Key, value: float) -> bool:
        """Return whether this part contributes a tenth of what it did, while the other blocks' parts do as before."""
        index, signal = key
        if key not in self._before and value < SMALL:
            past = earlier(history, signal, index, PAST)
            if len(past) >= FEWEST and median(past) >= FELL * value and _others_stayed(history, sample, signal, index):
                self._before[key] = median(past)
        holds = key in self._before and FELL * value <= self._before[key]
        if not holds:
            self._before.pop(key, None)
        return self._streaks.lasts((*key, "fallen"), holds, sample.step, 3, 10)

    def _is_weak(self, key: Key, value: float, all_values: list[float], step: int) -> bool:
        low = value < WARN and (key[1] == "branch_ratio" or FELL * value <= median(all_values))
        if not low:
            self._weak.pop(key, None)
        elif value >= GROWN * self._weak.setdefault(key, value):
            self._weak[key] = value
            self._streaks.end((*key, "weak"))
        return self._streaks.lasts((*key, "weak"), low, step, 3, 50)

    def _fallen_gains(self, history: History, sample: Sample) -> Iterable[Alarm]:
        now = values_of(sample, "gain_max")
        then = values_of(history.samples[-2], "gain_max") if len(history.samples) > 1 else []
        pairs = enumerate(zip(now, then, strict=False))
        falls = {at: old / max(new, 1e-30) for at, (new, old) in pairs if new is not None and old}
        typical = median(list(falls.values())) if falls else 1.0
        for index, norm in enumerate(history.facts.norms[: len(now)]):
            value = now[index]
            if index not in self._gains and falls.get(index, 1.0) >= FELL and (typical < OTHERS or len(falls) == 1):
                self._gains[index] = then[index] or 0.0, sample.step
            if index in self._gains and value is not None and FELL * value > self._gains[index][0]:
                del self._gains[index]
            if index in self._gains and value is not None:
                before, step = self._gains[index]
                evidence = f"Gains set to 0: the largest gain of {norm.name} fell from {before:.3g} to {value:.2g} by "
                evidence += f"step {step}, so the layers that read its output get almost no input."
                remedy = f"Look for code that writes to the gains of {norm.name}, or restore a checkpoint."
                yield self.alarm(sample.step, "fail", norm.name, evidence, remedy)

    def _explain(self, history: History, sample: Sample, index: int, signal: str, value: float) -> Alarm:
        layer, what = _named(history.facts, index, signal)
        was = " It contributed earlier in this run." if (index, signal) in self._alive else ""
        unit = "" if signal == "stream_rms" else " relative to the residual stream"
        before = self._before.get((index, signal))
        if before is not None and value > DEAD:
            was = f" It fell {fold(before / value)} from {before:.2g}, while the other blocks hardly changed."
        evidence = f"{what} {layer} is silent: the RMS of its output{unit} is {value:.2g}.{was}"
        remedy = f"Check {layer} for a gain, a mask or weights equal to 0, or for a product that underflows."
        grown = _stream_growth(history, sample, index)
        if before is not None and value > DEAD and grown * grown >= before / value:
            evidence += f" The residual stream before it has grown {fold(grown)} meanwhile."
            remedy = f"Find out why the stream has grown, in the blocks before {layer}: its own output may be ordinary."
        return self.alarm(sample.step, "fail", layer, evidence, remedy)


def _stream_growth(history: History, sample: Sample, index: int) -> float:
    """Return how many times as large as before the residual stream is that a block reads; 1 if it is unknown."""
    now = value_at(sample, "stream_rms", index - 1) if index > 0 else None
    past = earlier(history, "stream_rms", index - 1, PAST) if now else []
    return now / median(past) if now and past and median(past) > 0.0 else 1.0


def _others_stayed(history: History, sample: Sample, signal: str, index: int) -> bool:
    """Return whether the signal of the median other block fell less than 2-fold below its own past."""
    ratios = []
    for at, value in enumerate(values_of(sample, signal)):
        past = earlier(history, signal, at, PAST) if at != index and value else []
        if value and len(past) >= FEWEST:
            ratios.append(median(past) / value)
    return not ratios or median(ratios) < OTHERS


def _named(facts: Facts, index: int, signal: str) -> tuple[str, str]:
    """Return the layer's name and its kind."""
    parts = {
        "attention_ratio": ("Attention", facts.attentions),
        "feed_forward_ratio": ("Feed-forward", facts.feed_forwards),
    }
    what, names = parts.get(signal, ("Block", facts.blocks))
    name = names[index] if index < len(names) else None
    return name or facts.blocks[index], what
