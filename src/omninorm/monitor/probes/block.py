"""Probes of embeddings, blocks, the layers that write to the residual stream, and the logits.

Each has a method `see`, which takes the tensors that a hook received and writes to the buffers. In every step a
sentinel records the largest |x|; in sampled steps the statistics are computed from at most a few hundred rows.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from omninorm.monitor.probes.padding import Padding, mean_over
from omninorm.monitor.stats_buffer import StatsBuffer

MOST_ROWS = 256
# A hidden unit is dead if it stays below this share of the layer's RMS for all of this many tokens.
SILENT, SILENT_ROWS = 1e-3, 512
MEDIAN_OF = 4096
LARGE = 2**22


@lru_cache(maxsize=4096)
def stride(count: int, most: int) -> int:
    """Return the stride that selects about `most` of `count` items, or somewhat fewer; 1 for less than twice as many.

    It is coprime to `count`. Otherwise it could coincide with the length of a batch's sequences and select only first
    tokens, or with the rows of a matrix and select one column.
    """
    step = max(1, count // most)
    while math.gcd(step, count) > 1:
        step += 1
    return step


def some_rows(x: Tensor, most: int = MOST_ROWS) -> Tensor:
    """Return at most about `most` evenly spaced rows of x (…, d), in float32 (float64 is kept): (rows, d)."""
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows[:: stride(rows.shape[0], most)]
    return rows if rows.dtype == torch.float64 else rows.float()


def some_of(values: Tensor | None, most: int = MOST_ROWS) -> Tensor | None:
    """Return the entries of `values` (rows,) for the rows that `some_rows` returns."""
    return None if values is None else values[:: stride(values.shape[0], most)]


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return min x and max x; NaN if there is one, 0 for an empty tensor."""
    if x.numel() == 0:
        zero = x.new_zeros(())
        return zero, zero
    least, most = torch.aminmax(x.detach())
    return least, most


def mean_square(rows: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return mean(x²), in float64 where supported: the squares of an exploding stream overflow float32.

    Args:
        counts: which rows count; None means all.
    """
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    if counts is not None:
        rows = rows.masked_fill(~counts.unsqueeze(-1), 0)
    norm: Tensor = torch.linalg.vector_norm(rows, dtype=dtype)
    if counts is None:
        return norm.square() / max(1, rows.numel())
    return norm.square() / (counts.sum() * rows.shape[-1]).clamp_min(1)


class Sentinel:
    """A module whose output is only checked for NaNs and infinities."""

    def __init__(self, buffer: StatsBuffer, sentinel: int) -> None:
        self.buffer, self.sentinel = buffer, sentinel

    def see(self, y: Tensor) -> None:
        # For logits over a large vocabulary, some rows are enough.
        self.buffer.sentinel(self.sentinel, *extremes(y if y.numel() <= LARGE else some_rows(y)))


class BlockProbe:
    """A block's input and output."""

    def __init__(self, buffer: StatsBuffer, sentinel: int, index: int, padding: Padding) -> None:
        self.buffer, self.sentinel, self.index, self.padding = buffer, sentinel, index, padding

    def see(self, y: Tensor, x: Tensor | None = None) -> None:
        """Measure the block's output y and its input x; None if it is unknown or was overwritten."""
        buffer, index = self.buffer, self.index
        least, most = extremes(y)
        buffer.sentinel(self.sentinel, least, most)
        if not buffer.sampling or y.numel() == 0:
            return
        buffer.peak("stream_max", index, torch.maximum(most, -least))
        after, counts = some_rows(y), some_of(self.padding.rows(y.shape[:-1]))
        buffer.add("stream_ms", index, mean_square(after, counts))
        flat = after if counts is None else after.masked_fill(~counts.unsqueeze(-1), math.nan)
        flat = flat.flatten()
        buffer.add("stream_median", index, flat[:: stride(flat.numel(), MEDIAN_OF)].abs().nanmedian())
        if x is None or x.shape != y.shape:
            return
        before = some_rows(x)
        buffer.add("input_ms", index, mean_square(before, counts))
        buffer.add("difference_ms", index, mean_square(after - before, counts))
        angles = F.cosine_similarity(after, before, dim=-1).clamp(-1, 1).arccos()
        buffer.add("angle", index, (angles.mean() if counts is None else mean_over(angles, counts)) / math.pi)

    def see_gradient(self, dy: Tensor) -> None:
        self.buffer.add_gradient("stream_grad_ms", self.index, mean_square(some_rows(dy)))

    def see_gradient_if_sampled(self, dy: Tensor) -> None:
        if self.buffer.sampling:
            self.see_gradient(dy)


class WriterProbe:
    """The output of the last layer of an attention or feed-forward, before it is added to the stream."""

    def __init__(self, buffer: StatsBuffer, sentinel: int, index: int, role: str, padding: Padding) -> None:
        self.buffer, self.sentinel, self.index, self.role, self.padding = buffer, sentinel, index, role, padding

    def see(self, y: Tensor, hidden: Tensor | None = None) -> None:
        """Measure the output y, and the hidden units: the input of a feed-forward's last layer."""
        buffer = self.buffer
        buffer.sentinel(self.sentinel, *extremes(y))
        if not buffer.sampling or y.numel() == 0:
            return
        buffer.add(f"{self.role}_ms", self.index, mean_square(some_rows(y), some_of(self.padding.rows(y.shape[:-1]))))
        if hidden is not None and self.role == "feed_forward":
            rows = some_rows(hidden, SILENT_ROWS)
            silent = rows.abs().amax(0) <= SILENT * torch.linalg.vector_norm(rows) / max(1, rows.numel()) ** 0.5
            buffer.add("dead_units", self.index, silent.to(torch.float32).mean())


class LogitsProbe:
    """The model's output over a vocabulary."""

    def __init__(self, buffer: StatsBuffer) -> None:
        self.buffer = buffer

    def see(self, logits: Tensor) -> None:
        if not self.buffer.sampling or logits.numel() == 0:
            return
        z = some_rows(logits, 64).logsumexp(dim=-1)
        self.buffer.add("logz_mean", 0, z.mean())
        self.buffer.add("logz", 0, z.gather(0, z.abs().argmax(0, keepdim=True)).squeeze(0))
