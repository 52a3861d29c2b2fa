"""Statistics of a norm's gains γ."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SILENT = 1e-3


@dataclass
class Gains:
    """Statistics of one norm's gains, such as the smallest, median and largest |γ|.

    ratio is max |γ| / median |γ|, or None if the median is 0. silent is the fraction of gains with |γ| < SILENT, and
    negative the fraction with γ < 0.
    """

    count: int
    smallest: float
    median: float
    largest: float
    largest_at: int
    ratio: float | None
    silent: float
    silent_first: int | None
    negative: float


def measure_gains(gain: Tensor) -> Gains:
    """Measure γ, [d]; the offset that the file leaves out (Gemma's 1 +) has already been added."""
    size = gain.abs()
    median, at = float(size.median()), int(size.argmax())
    silent = size < SILENT
    return Gains(
        count=len(size),
        smallest=float(size.min()),
        median=median,
        largest=float(size[at]),
        largest_at=at,
        ratio=float(size[at]) / median if median > 0.0 else None,
        silent=float(silent.double().mean()),
        silent_first=int(silent.int().argmax()) if bool(silent.any()) else None,
        negative=float((gain < 0).double().mean()),
    )
