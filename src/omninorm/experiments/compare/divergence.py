"""When a training run whose learning rate rises has been lost, and at which step it still got further.

The losses are smoothed over a twentieth of the run. The run got further where the smoothed loss falls by a share of
`GAIN` below its value at the last such step, unless it is then on `PLATEAU`, near what the frequencies of letters give:
a run that has stopped there falls now and then by the chance of its batches alone. It was lost if

- a loss is **not finite**, or the run ended early;
- it has **an unrecovered spike**: at the end the smoothed loss is more than `RISE` times its lowest value;
- it **stagnates**: it did not get further in the last `PATIENCE` of its steps;
- it is **abnormally slow**: its lowest smoothed loss is not below `LEARNED` times what the frequencies of letters give;

and then it was lost behind the last step at which it got further. The protocol is KEEL's (arXiv 2601.19895), which
names these four signs without numbers; the numbers are ours.
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
PLATEAU = (LEARNED, 1.02)  # times what the frequencies of letters give


class Divergence(NamedTuple):
    """sign: "not finite", "spike", "stagnation", "slow", or None where a run was not lost; step: the last good one."""

    sign: str | None
    step: int


def find_divergence(losses: Sequence[float], steps: int, unigram: float) -> Divergence:
    """Whether and where a run was lost.

    Args:
        losses: of each step, in the unit of `unigram`; fewer than `steps` where the run ended early.
        steps: that the run was to have.
        unigram: the loss of predicting letters by their frequencies.

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
    """The last place off the plateau at which the smoothed loss had become lower, by a share of GAIN, than before."""
    best, at = smooth[0], 0
    for place, value in enumerate(smooth):
        on_plateau = PLATEAU[0] * unigram <= value <= PLATEAU[1] * unigram
        if value < (1 - GAIN) * best and not on_plateau:
            best, at = value, place
    return at
