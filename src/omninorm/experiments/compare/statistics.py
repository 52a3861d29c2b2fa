"""Paired comparisons: differences seed by seed, their intervals, and what may be said.

Intervals are Student's t at 95 %. The p-values of a family are corrected by Holm's procedure, and a verdict needs
p < 0.02: of two hundred comparisons of equals hardly ever more than 5 % then end in one, where p < 0.05 would let half
of such series have more. "No difference" is said only where the whole interval lies within the smallest difference
that matters; otherwise more seeds are asked for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL, SIGNIFICANCE, POWER = 0.95, 0.02, 0.8
BETTER, WORSE, EQUAL = "better", "worse", "no difference"
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Paired:
    """The differences of two configurations, ours minus the baseline's, over the same seeds.

    Args:
        mean: of the differences.
        low, high: the 95 % interval of the mean; infinite with fewer than two seeds.
        p: of the two-sided t-test; 1 with fewer than two seeds.
        spread: standard deviation of the differences.
        seeds: how many.
    """

    mean: float
    low: float
    high: float
    p: float
    spread: float
    seeds: int


def paired(ours: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compares two configurations on the same seeds.

    Example:
        >>> result = paired([2.0, 2.1, 2.3], [2.5, 2.7, 2.8])
        >>> round(result.mean, 3), round(result.low, 3), round(result.high, 3)
        (-0.533, -0.677, -0.39)
    """
    differences = [a - b for a, b in zip(ours, baseline, strict=True)]
    count, mean = len(differences), statistics.fmean(differences)
    if count < 2:
        return Paired(mean, -math.inf, math.inf, 1.0, math.nan, count)
    spread = statistics.stdev(differences)
    if spread == 0:
        return Paired(mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0, count)
    error = spread / math.sqrt(count)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Paired(mean, mean - reach, mean + reach, p, spread, count)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of a family, corrected so that the chance of any false finding stays below the level asked for.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=lambda at: ps[at])
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[at]))
        corrected[at] = largest
    return corrected


def judge(result: Paired, p: float, margin: float, lower_is_better: bool = True) -> str:
    """What may be said of a difference.

    Args:
        result: the comparison.
        p: its p-value, corrected for its family.
        margin: the smallest difference that matters.
        lower_is_better: of the values that were compared.
    """
    if result.seeds < 2:
        return "no verdict: fewer than two seeds show that something happens, not how often"
    if p < SIGNIFICANCE:
        return BETTER if (result.mean < 0) == lower_is_better else WORSE
    if -margin <= result.low and result.high <= margin:
        return EQUAL
    more = max(1, seeds_needed(result.spread, margin) - result.seeds)
    return f"not enough evidence: needs about {more} more seed{'s' if more > 1 else ''}"


def seeds_needed(spread: float, margin: float) -> int:
    """The number of seeds with which a difference of `margin` would be found in `POWER` of the cases."""
    for count in range(2, MOST_SEEDS):
        reach = float(stats.t.ppf(1 - SIGNIFICANCE / 2, count - 1) + stats.t.ppf(POWER, count - 1))
        if reach * spread / math.sqrt(count) <= margin:
            return count
    return MOST_SEEDS
