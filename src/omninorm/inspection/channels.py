"""Rows and columns of a matrix: which are dead, and which outweigh the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEAD = 1e-3
"""A channel of less than this share of the whole matrix's RMS is dead."""
_NAMED = 8


@dataclass
class Channels:
    """Of the rows, or of the columns. RMS is a channel's √mean(w²), median that of all channels.

    dead counts those below DEAD × the matrix's RMS, dead_first names the first of them; ratio is the largest RMS /
    median at channel `largest`; None where the median is 0.
    """

    count: int
    dead: int
    dead_first: list[int] = field(default_factory=list)
    median: float = 0.0
    ratio: float | None = None
    largest: int = 0


class ChannelSums:
    """Sums of squares by row and by column, as the rows go by; float64, since there may be millions of rows."""

    def __init__(self, columns: int) -> None:
        self._rows: list[Tensor] = []
        self._columns = torch.zeros(columns, dtype=torch.float64)

    def add(self, rows: Tensor, columns: Tensor) -> None:
        """Sums of squares of the next rows, [rows], and of them by column, [columns]."""
        self._rows.append(rows.double())
        self._columns += columns

    def finish(self) -> tuple[Channels, Channels]:
        """(rows, columns)."""
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
