"""The first step and layer at which two runs differ, and at which they differ by more than noise.

A difference counts if it exceeds a tolerance that follows from the noise before it: the changes from one step to the
next, in the calmer of the two runs. Runs that are equal in their first step have the same data, so noise cancels and
one standard deviation is enough; otherwise it takes six. A difference must last for three steps of a curve, or for two
samples. The learning rate has no noise. A layer's value that is missing in one of the runs, such as a gradient that
does not arrive, is found first: the differences of other values may follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from omninorm.record.signals import SIGNALS, STEP_SERIES
from omninorm.report.story import RunStory, Values

WINDOW = 128
_WITHOUT_NOISE = ("lr",)
_OF_PARAMETERS = ("weight_rms", "gain_max", "gain_ratio", "gain_small")
_OF_GRADIENTS = ("grad_norm", "stream_grad")


class _Tolerance(NamedTuple):
    """What is needed to count as a difference.

    Args:
        floor: the smallest relative difference.
        sigmas: the smallest difference in standard deviations of the noise.
        fewest: the fewest changes that an estimate of the noise needs; at the beginning these are the first ones.
        lasts: the steps or samples for which it must last.
    """

    floor: float
    sigmas: float
    fewest: int
    lasts: int


# For curves and signals of runs that begin equal, and of others.
_EQUAL = _Tolerance(1e-3, 1.0, 16, 3), _Tolerance(0.01, 1.0, 8, 2)
_OTHER = _Tolerance(0.05, 6.0, 16, 3), _Tolerance(0.5, 6.0, 8, 2)


class Difference(NamedTuple):
    """Two values that differ.

    Args:
        step: the step.
        name: the signal, or "loss", "grad_norm" or "lr".
        layer: the layer; None for the whole run.
        first: the value in the first run; None if it is missing.
        second: the value in the second run; None if it is missing.
        excess: how many times the tolerance the difference is; ∞ if one is missing.
    """

    step: int
    name: str
    layer: str | None
    first: float | None
    second: float | None
    excess: float

    @property
    def is_missing(self) -> bool:
        return self.first is None or self.second is None


@dataclass(frozen=True)
class Parting:
    """How two runs differ.

    Args:
        steps: the number of steps that both runs recorded.
        samples: the number of samples compared, taken at the same steps.
        unequal: the first value that differs at all; None if all are equal.
        curve: where the first curve parts beyond its noise; None if none does.
        layers: the signals of the first sample in which any parts beyond its noise: missing ones, largest excess first.
    """

    steps: int
    samples: int
    unequal: Difference | None
    curve: Difference | None
    layers: Sequence[Difference] = ()

    @property
    def lead(self) -> Difference | None:
        """The difference to name: a missing value, or else the earliest; None if the runs do not part."""
        found = [each for each in (self.curve, *self.layers[:1]) if each]
        return min(found, key=lambda each: (not each.is_missing, each.step), default=None)

    @property
    def step(self) -> int | None:
        """The first step at which the runs differ by more than noise, or None."""
        found = [each.step for each in (self.curve, *self.layers[:1]) if each]
        return min(found, default=None)


class _Pair(NamedTuple):
    """One number over the steps that both runs recorded."""

    name: str
    layer: str | None
    steps: Sequence[int]
    first: Values
    second: Values


def compare(first: RunStory, second: RunStory) -> Parting:
    """Return where two runs part."""
    curves = [pair for name in STEP_SERIES if (pair := _curve(first, second, name)).steps]
    cells = list(_cells(first, second))
    unequal = [found for pair in (*curves, *cells) if (found := _first_unequal(pair))]
    begin = min((pair.steps[0] for pair in (*curves, *cells)), default=0)
    equal = all(each.step > begin for each in unequal)
    of_curves, of_signals = _EQUAL if equal else _OTHER
    missing = _missing(first, second)
    parted = [found for pair in curves if (found := _part(pair, of_curves))]
    layers = [*missing, *(found for pair in cells if (found := _part(pair, of_signals)))]
    earliest = min((each.step for each in layers), default=0)
    return Parting(
        steps=max((len(pair.steps) for pair in curves), default=0),
        samples=len(common_steps(first, second)),
        unequal=min([*missing, *unequal], key=lambda each: (each.step, -each.excess), default=None),
        curve=min(parted, key=lambda each: (each.step, -each.excess), default=None),
        layers=sorted((each for each in layers if each.step == earliest), key=_rank),
    )


def common_steps(first: RunStory, second: RunStory) -> list[int]:
    """Return the steps of the samples that were read from both runs."""
    known = {column.step for column in second.columns}
    return [column.step for column in first.columns if column.step in known]


def common_layers(first: RunStory, second: RunStory, axis: str) -> list[str]:
    """Return the names along an axis that both models have."""
    known = set(second.watched.names(axis)) if second.watched else set()
    return [name for name in (first.watched.names(axis) if first.watched else []) if name in known]


def values_at(story: RunStory, name: str, steps: Sequence[int], layers: Sequence[str]) -> list[Values]:
    """Return a signal's values at the given samples, in the order of the given layers."""
    assert story.watched is not None
    places = {layer: place for place, layer in enumerate(story.watched.names(SIGNALS[name].axis))}
    columns = {column.step: column.signals.get(name) for column in story.columns}
    rows = [columns[step] for step in steps]
    return [[None if row is None else row[places[layer]] for layer in layers] for row in rows]


def _rank(found: Difference) -> tuple[bool, float, bool, int]:
    """Sort by excess after missing values, gradients first; of equal ones parameters come first, and then signals in
    the order of the forward pass."""
    first = _OF_GRADIENTS if found.is_missing else _OF_PARAMETERS
    return not found.is_missing, -found.excess, found.name not in first, list(SIGNALS).index(found.name)


def _curve(first: RunStory, second: RunStory, name: str) -> _Pair:
    one, two = (
        dict(zip(*story.series[name], strict=True)) if name in story.series else {} for story in (first, second)
    )
    steps = [step for step in one if step in two]
    return _Pair(name, None, steps, [one[step] for step in steps], [two[step] for step in steps])


def _columns(first: RunStory, second: RunStory) -> Iterator[_Pair]:
    """Yield each layer's values at the steps that both runs sampled, with None for missing ones."""
    steps = common_steps(first, second)
    for name, signal in SIGNALS.items() if first.watched and second.watched else ():
        layers = common_layers(first, second, signal.axis)
        rows = [values_at(story, name, steps, layers) for story in (first, second)]
        for place, layer in enumerate(layers):
            one, two = ([row[place] for row in each] for each in rows)
            yield _Pair(name, layer if signal.axis != "run" else None, steps, one, two)


def _cells(first: RunStory, second: RunStory) -> Iterator[_Pair]:
    """Yield the columns without samples that lack a value in either run."""
    for pair in _columns(first, second):
        known = [i for i, values in enumerate(zip(pair.first, pair.second, strict=True)) if None not in values]
        if known:
            one, two = ([row[i] for i in known] for row in (pair.first, pair.second))
            yield _Pair(pair.name, pair.layer, [pair.steps[i] for i in known], one, two)


def _missing(first: RunStory, second: RunStory) -> list[Difference]:
    """Return the values of layers that are missing in one of the runs for two samples, the last layers first: gradients
    flow back from them. A signal that a run lacks completely is a matter of its settings, unless it is a gradient."""
    found = []
    for pair in reversed([pair for pair in _columns(first, second) if pair.layer]):
        lacks = [(one is None) != (two is None) for one, two in zip(pair.first, pair.second, strict=True)]
        for i, step in enumerate(pair.steps):
            if lacks[i : i + 2] == [True, True] and (pair.name in _OF_GRADIENTS or _has_both(first, second, pair.name)):
                found.append(Difference(step, pair.name, pair.layer, pair.first[i], pair.second[i], math.inf))
                break
    return found


def _has_both(first: RunStory, second: RunStory, name: str) -> bool:
    """Return whether both runs have measured a signal in any layer."""
    return all(any(column.signals.get(name) for column in story.columns) for story in (first, second))


def _first_unequal(pair: _Pair) -> Difference | None:
    for step, one, two in zip(pair.steps, pair.first, pair.second, strict=True):
        if one != two and not (one != one and two != two):
            relative = abs(one - two) / max(abs(one), abs(two)) if _is_finite(one, two) else math.inf  # type: ignore[operator, arg-type]
            return Difference(step, pair.name, pair.layer, one, two, relative)
    return None


def _part(pair: _Pair, needed: _Tolerance) -> Difference | None:
    """Return the first difference that exceeds the tolerance and lasts."""
    one, two = _scaled(pair)
    gaps = [_gap(x, y) for x, y in zip(one, two, strict=True)]
    tolerances = _tolerances(pair.name, one, two, needed)
    beyond = [gap > tolerance for gap, tolerance in zip(gaps, tolerances, strict=True)]
    for i, gap in enumerate(gaps):
        if beyond[i] and (math.isinf(gap) or beyond[i : i + needed.lasts] == [True] * needed.lasts):
            excess = gap / tolerances[i]
            return Difference(pair.steps[i], pair.name, pair.layer, pair.first[i], pair.second[i], excess)
    return None


def _scaled(pair: _Pair) -> tuple[list[float], list[float]]:
    """Return the two rows on a scale where noise has about the same size everywhere: logarithms if that is possible,
    shares of the typical size for other curves, and the values themselves for signals on a linear scale."""
    rows = [[math.nan if value is None else value for value in row] for row in (pair.first, pair.second)]
    finite = [value for row in rows for value in row if math.isfinite(value)]
    logarithmic = SIGNALS[pair.name].logarithmic if pair.name in SIGNALS and pair.layer else pair.name in STEP_SERIES
    if logarithmic and finite and min(finite) > 0:
        return tuple([math.log(value) if math.isfinite(value) else value for value in row] for row in rows)  # type: ignore[return-value]
    sizes = sorted(map(abs, finite))
    typical = (sizes[len(sizes) // 2] if sizes else 1.0) or 1.0
    unit = typical if logarithmic or pair.layer is None else 1.0
    return tuple([value / unit for value in row] for row in rows)  # type: ignore[return-value]


def _tolerances(name: str, one: list[float], two: list[float], needed: _Tolerance) -> list[float]:
    """Return the tolerance at each step, from the noise before it."""
    if name in _WITHOUT_NOISE or len(one) < 2:
        return [_EQUAL[0].floor if name in _WITHOUT_NOISE else needed.floor] * len(one)
    noises = [
        _rolling([(after - before) ** 2 / 2 for before, after in pairwise(row)], needed.fewest) for row in (one, two)
    ]
    calmer = [math.sqrt(2) * min(pair) for pair in zip(*noises, strict=True)]
    # At a step, the noise up to the change before it; at the beginning, that of the first few changes.
    places = [min(max(i - 2, 0), len(calmer) - 1) for i in range(len(one))]
    return [max(needed.floor, needed.sigmas * calmer[place]) for place in places]


def _rolling(squares: list[float], fewest: int) -> list[float]:
    """Return at each place the root of the mean of the squares up to there: of at least the first `fewest` and at most
    the last 128. Values that are not finite are left out."""
    kept = [value if math.isfinite(value) else 0.0 for value in squares]
    sums = [0.0, *accumulate(kept)]
    found = []
    for place in range(len(kept)):
        end = min(max(place + 1, fewest), len(kept))
        start = max(0, end - WINDOW)
        found.append(math.sqrt(max(0.0, sums[end] - sums[start]) / (end - start)))
    return found


def _gap(one: float, two: float) -> float:
    """Return the distance; ∞ if only one of the values is finite, or if they are different infinities."""
    if _is_finite(one, two):
        return abs(one - two)
    return 0.0 if one == two or (one != one and two != two) else math.inf


def _is_finite(*values: float) -> bool:
    return all(map(math.isfinite, values))
