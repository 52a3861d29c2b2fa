"""weights-vanish: weights or gains shrink steadily because weight decay dominates, or something resets them to 0.

Signals: RMS(w) and RMS(Δw)/RMS(w) of a step, by group of parameters; the median gain of each norm; and learning rate ×
weight decay, the share of the weights that the optimizer itself removes per step. Threshold: within 50 steps, without
ever rising, the matrices of a group fell at least 1.5-fold, or the median gain of a norm did, and at least a third of
that share per step is weight decay. In training, weights grow or stay about the same; AdamW's usual decay, learning
rate × weight decay, removes 1e-5 to 1e-3 of them per step, so at most 5 % in 50 steps. Where the decay is not known,
or is not the cause, a 3-fold fall of matrices counts. A "fail" if the fall is 2-fold or more for 3 consecutive samples
over 10 steps; before that, a warning. If all matrices of a group are 0, or most were 0 before the step (RMS(Δw)/RMS(w)
is then above 1e6), at 2 samples 4 or more steps apart, it is a "fail" at once. [ours]
Persistence: as given above. If most groups shrink, the whole run is reported, otherwise each group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import EXTREME_SPAN, LOSS_ALARMS, Rule
from omninorm.monitor.rules.numbers import Streaks, fold, known, values_of
from omninorm.record.alarm import Alarm

FALL, SEVERE, UNEXPLAINED = 1.5, 2.0, 3.0
WITHIN, FEWEST = 50, 3  # steps, and samples in them
EXPLAINED = 1 / 3  # of the shrinkage
MOST = 0.6  # share of the groups; from here on, the whole run is reported
SAMPLES, STEPS = 3, 10
RESET = 1e6
Numbers = Sequence[float | None]


class Shrinking(NamedTuple):
    """A fall of one group's weights or one norm's gains since a step, and the decay that acts on them."""

    layer: str
    fall: float
    since: int
    share: float
    decay: float | None

    @property
    def by_decay(self) -> bool:
        return self.decay is not None and self.decay >= EXPLAINED * self.share


class WeightsVanish(Rule):
    """Reports the whole run or the groups, with the share that each step removes."""

    name = "weights-vanish"
    source = "the thresholds, 1.5-fold and 3-fold within 50 steps, are omninorm's own; see docs/watching.md"
    explains = (
        *LOSS_ALARMS,
        "gain-drift",
        "branch-silent",
        "eps-share",
        "learning-rate",
        "adam-eps",
        "depth-growth",
        "no-progress",
        "dead-units",
        "odd-block",
        "layer-jump",
    )

    def __init__(self) -> None:
        self._streaks = Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        yield from self._resets(history, sample)
        facts, decayed = history.facts, sample.decay
        weights = _shrinking(history, sample, facts.groups, "weight_rms", decayed)
        if weights:
            yield from self._explain(sample, "weights", "weight_rms", weights)
        norms = [norm.name for norm in facts.norms]
        gains = _shrinking(history, sample, norms, "gain_max", sample.gain_decay, over="gain_ratio")
        if gains and not _are_most(weights, sample, "weight_rms"):
            yield from self._explain(sample, "gains", "gain_max", gains)
        self._end_others(sample.step, {shrinking.layer for shrinking in [*weights, *gains]})

    def _resets(self, history: History, sample: Sample) -> Iterable[Alarm]:
        sizes = values_of(sample, "weight_rms")
        for index, ratio in enumerate(values_of(sample, "update_ratio")[: len(history.facts.groups)]):
            size = sizes[index] if index < len(sizes) else None
            holds = ratio is not None and (ratio > RESET or size == 0.0)
            if self._streaks.lasts(("reset", index), holds, sample.step, 2, EXTREME_SPAN):
                layer = history.facts.groups[index]
                when = "are 0" if size == 0.0 else "were 0 before the step, in every sample"
                evidence = f"Weights set to 0: most matrices of {layer} {when}."
                remedy = f"Look for code that writes to the weights of {layer} between steps."
                yield self.alarm(sample.step, "fail", layer, evidence, remedy)

    def _end_others(self, step: int, layers: set[str]) -> None:
        for key in [key for key in self._streaks.running() if isinstance(key, str) and key not in layers]:
            self._streaks.end(key)

    def _explain(self, sample: Sample, what: str, signal: str, found: list[Shrinking]) -> Iterable[Alarm]:
        lasting = {
            each.layer: self._streaks.lasts(each.layer, each.fall >= SEVERE, sample.step, SAMPLES, STEPS)
            for each in found
        }
        if _are_most(found, sample, signal):
            each = sorted(found, key=lambda each: each.fall)[len(found) // 2]
            whose = f"{len(found)} of {len(known(values_of(sample, signal)))} {_NAMES[what]}"
            yield self._report(sample.step, None, whose, what, each, any(lasting.values()))
            return
        for each in sorted(found, key=lambda each: each.fall, reverse=True):
            yield self._report(sample.step, each.layer, f"those of {each.layer}", what, each, lasting[each.layer])

    def _report(self, step: int, layer: str | None, whose: str, what: str, each: Shrinking, failed: bool) -> Alarm:
        cause = "Weight decay too large" if each.by_decay else f"{what.capitalize()} shrink"
        evidence = f"{cause}: the {what} ({whose}) have shrunk {fold(each.fall)} since step {each.since}, "
        evidence += f"by about {100 * each.share:.2g} % per step"
        if each.by_decay and each.decay is not None:
            evidence += f"; learning rate × weight decay removes {100 * each.decay:.2g} % per step."
            remedy = "Lower weight decay: learning rate × weight decay is usually 1e-3 per step or less."
            if what == "gains":
                remedy = "Do not apply weight decay to gains: put them into a parameter group with weight_decay=0."
        elif each.decay is None:
            evidence += "."
            remedy = "Lower weight decay if the optimizer has any, and look for code that scales these weights."
        else:
            evidence += f", of which weight decay explains {100 * each.decay:.2g} %."
            remedy = f"Look for code that scales or projects the {what}. The optimizer's weight decay is not the cause."
        return self.alarm(step, "fail" if failed else "warn", layer, evidence, remedy)


def _are_most(found: Sequence[Shrinking], sample: Sample, signal: str) -> bool:
    count = len(known(values_of(sample, signal)))
    return count > 1 and len(found) >= MOST * count


_NAMES = {"weights": "parameter groups", "gains": "norms"}


def _shrinking(
    history: History, sample: Sample, layers: Sequence[str], signal: str, decays: Numbers, over: str | None = None
) -> list[Shrinking]:
    """Return the layers whose signal (divided by `over`) has only fallen within 50 steps, by enough to be reported."""
    recent = [each for each in list(history.samples)[-WITHIN - 1 :] if sample.step - each.step <= WITHIN]
    if len(recent) < FEWEST:
        return []
    table = [_divided(each, signal, over) for each in recent]
    found = []
    for index, values in enumerate(zip(layers, *table, strict=False)):
        numbers = known(values[1:])
        if len(numbers) < len(table) or min(numbers) <= 0.0 or max(numbers) < FALL * numbers[-1]:
            continue
        start = max(range(len(numbers)), key=lambda at: (numbers[at], at))
        steps = sample.step - recent[start].step
        if len(numbers) - start < FEWEST or any(new > old for old, new in pairwise(numbers[start:])):
            continue
        fall = numbers[start] / numbers[-1]
        share = 1.0 - fall ** (-1.0 / steps)
        decay = decays[index] if index < len(decays) else None
        each = Shrinking(layers[index], fall, recent[start].step, share, decay)
        if fall >= FALL if each.by_decay else fall >= UNEXPLAINED and over is None:
            found.append(each)
    return found


def _divided(sample: Sample, signal: str, over: str | None) -> Numbers:
    values = values_of(sample, signal)
    if over is None:
        return values
    return [v / r if v and r else None for v, r in zip(values, values_of(sample, over), strict=False)]
