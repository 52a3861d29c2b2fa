"""Divergence of a training run with a rising learning rate, and the last step at which it made progress.

The losses are smoothed over a twentieth of the run. The run makes progress at a step if the smoothed loss has fallen by
the fraction `GAIN` since the previous step with progress. Losses within `PLATEAU`, near the unigram baseline, do not
count: there the loss of a stalled run sometimes falls by chance. The run has diverged if

- a loss is **not finite**, or the run ended early;
- it has **an unrecovered spike**: the final smoothed loss is more than `RISE` times its lowest value;
- it **stagnates**: it made no progress in the last `PATIENCE` of its steps;
- it is **abnormally slow**: its lowest smoothed loss is not below `LEARNED` times the unigram baseline.

Such a run counts as diverged after its last step with progress. The protocol is KEEL's (arXiv 2601.19895), which names
these four signs but no thresholds; we chose the thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SMOOTHED, LEAST_WINDOW = 0.05, 10
RISE = 1.1
GAIN = 0.02
PATIENCE = 0.2
LEARNED = 0.95
PLATEAU = (LEARNED, 1.02)  # as multiples of the unigram baseline


class Divergence(NamedTuple):
    """sign: "not finite", "spike", "stagnation", "slow", or None; step: the last step with progress."""

    sign: str | None
    step: int


def find_divergence(losses: Sequence[float], steps: int, unigram: float) -> Divergence:
    """Return whether and where a run diverged.

    Args:
        losses: the loss of each step, in the unit of `unigram`; fewer than `steps` if the run ended early.
        steps: the planned number of steps.
        unigram: the loss of the unigram baseline.

    Example:
        >>> find_divergence([4.0 - 0.02 * step for step in range(100)], 100, unigram=4.0)
        Divergence(sign=None, step=100)
    """
    window = max(LEAST_WINDOW, round(SMOOTHED * steps))
    finite = list(losses[: _first_bad(losses)])
    smooth = [math.fsum(finite[at - window : at]) / window for at in range(window, len(finite) + 1)]
    if not smooth:
        return Divergence("not finite", 0) if len(finite) < steps else Divergence(None, steps)
    last_good = _last_gain(smooth, unigram) + window
    lowest = min(smooth)
    if len(finite) < steps:
        return Divergence("not finite", last_good)
    if smooth[-1] > RISE * lowest:
        return Divergence("spike", last_good)
    if last_good <= (1 - PATIENCE) * steps:
        return Divergence("stagnation", last_good)
    if lowest >= LEARNED * unigram:
        return Divergence("slow", last_good)
    return Divergence(None, steps)


def _first_bad(losses: Sequence[float]) -> int:
    return next((at for at, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))


def _last_gain(smooth: Sequence[float], unigram: float) -> int:
    """Return the last position outside the plateau where the smoothed loss fell by GAIN."""
    best, at = smooth[0], 0
    for place, value in enumerate(smooth):
        on_plateau = PLATEAU[0] * unigram <= value <= PLATEAU[1] * unigram
        if value < (1 - GAIN) * best and not on_plateau:
            best, at = value, place
    return at
