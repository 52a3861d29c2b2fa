"""Statistics of a matrix's rows and columns, which find dead ones and outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEAD = 1e-3
"""A channel whose RMS is less than this fraction of the matrix's RMS is dead."""
_NAMED = 8


@dataclass
class Channels:
    """Statistics of a matrix's channels, its rows or its columns, from their RMS √mean(w²).

    dead is the number of channels with an RMS below DEAD × the matrix's RMS, and dead_first lists the first of them;
    median is the median RMS; ratio is the largest RMS (of channel `largest`) over the median, or None if it is 0.
    """

    count: int
    dead: int
    dead_first: list[int] = field(default_factory=list)
    median: float = 0.0
    ratio: float | None = None
    largest: int = 0


class ChannelSums:
    """Running sums of squares by row and by column, in float64 because there may be millions of rows."""

    def __init__(self, columns: int) -> None:
        self._rows: list[Tensor] = []
        self._columns = torch.zeros(columns, dtype=torch.float64)

    def add(self, rows: Tensor, columns: Tensor) -> None:
        """Add the next rows: their sums of squares by row, [rows], and by column, [columns]."""
        self._rows.append(rows.double())
        self._columns += columns

    def finish(self) -> tuple[Channels, Channels]:
        """Return the statistics of (rows, columns)."""
        rows = torch.cat(self._rows)
        whole = math.sqrt(float(rows.sum()) / (len(rows) * len(self._columns)))
        return (
            _channels((rows / len(self._columns)).sqrt(), whole),
            _channels((self._columns / len(rows)).sqrt(), whole),
        )


def _channels(rms: Tensor, whole: float) -> Channels:
    dead = (rms < DEAD * whole).nonzero().flatten()
    median, largest = float(rms.median()), int(rms.argmax())
    ratio = float(rms[largest]) / median if median > 0.0 else None
    return Channels(len(rms), len(dead), dead[:_NAMED].tolist(), median, ratio, largest)
