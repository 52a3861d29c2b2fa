"""Paired comparisons: differences by seed, their confidence intervals, and verdicts.

Intervals are Student's t at 95 %. Holm's procedure corrects the p-values of a family, and a verdict requires p < 0.02.
With this threshold, 200 comparisons of equal configurations rarely give more than 5 % false verdicts; with p < 0.05,
half of such series would. The verdict "no difference" requires that the whole interval is within the margin, the
smallest difference that matters. Otherwise the verdict is that more seeds are needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from omninorm.report.comparison.wording import not_enough_evidence

LEVEL, SIGNIFICANCE, POWER = 0.95, 0.02, 0.8
BETTER, WORSE, EQUAL = "better", "worse", "no difference"
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Paired:
    """The differences between two configurations, ours minus the baseline's, over the same seeds.

    Args:
        mean: mean of the differences.
        low, high: the 95 % interval of the mean; infinite with fewer than two seeds.
        p: p-value of the two-sided t-test; 1 with fewer than two seeds.
        spread: standard deviation of the differences.
        seeds: number of seeds.
    """

    mean: float
    low: float
    high: float
    p: float
    spread: float
    seeds: int


def paired(ours: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two configurations on the same seeds.

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
    """Correct a family's p-values so that the chosen level bounds the probability of any false positive.

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


def judge(
    result: Paired, p: float, margin: float, lower_is_better: bool = True, learned: tuple[int, int] | None = None
) -> str:
    """Return the verdict on a difference.

    Runs that did not learn are equally bad with any norm, so two configurations without a run that learned get no
    verdict. If only some runs learned, the spread mixes two populations, and the number of further seeds cannot be
    estimated from it.

    Args:
        result: the comparison.
        p: the comparison's p-value, corrected for its family.
        margin: the smallest difference that matters.
        lower_is_better: whether lower values are better.
        learned: the number of compared runs that learned, ours and the baseline's; None if that is not measured.
    """
    if learned == (0, 0) and result.seeds:
        return "no verdict (no run learned)"
    if result.seeds < 2:
        return "no verdict (at least two seeds needed)"
    if p < SIGNIFICANCE:
        verdict = BETTER if (result.mean < 0) == lower_is_better else WORSE
        if learned is not None and 0 in learned:
            return f"{verdict} ({'no run learned' if learned[0] == 0 else 'no run of the baseline learned'})"
        return verdict
    if -margin <= result.low and result.high <= margin:
        return EQUAL
    runs = 2 * result.seeds
    if learned is not None and sum(learned) < runs:
        return f"not enough evidence ({runs - sum(learned)} of {runs} runs did not learn)"
    return not_enough_evidence(max(1, seeds_needed(result.spread, margin) - result.seeds))


def seeds_needed(spread: float, margin: float) -> int:
    """Return the number of seeds that detect a difference of `margin` with probability `POWER`, at most MOST_SEEDS."""
    enough = np.flatnonzero(_detectable() * spread <= margin)
    return int(enough[0]) + 2 if len(enough) else MOST_SEEDS


@cache
def _detectable() -> Any:
    """Return the detectable difference, as a multiple of the standard deviation, for 2, 3, … seeds."""
    counts = np.arange(2, MOST_SEEDS)
    return (stats.t.ppf(1 - SIGNIFICANCE / 2, counts - 1) + stats.t.ppf(POWER, counts - 1)) / np.sqrt(counts)
