"""Probes of embeddings, blocks, the layers that write to the residual stream, and the logits.

Each has a method `see`, which takes the tensors that a hook received and writes to the buffers. In every step a
sentinel records the largest |x|. In sampled steps at most a few hundred rows are copied, from which the statistics of
several probes are computed together.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from omninorm.monitor.probes.padding import Padding, mean_over
from omninorm.monitor.stats_buffer import StatsBuffer
from omninorm.monitor.tensors import here, version_of, widest

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
    """Return at most about `most` evenly spaced rows of x (…, d): (rows, d), a view if possible."""
    x = here(x).detach()
    width = x.shape[-1]
    if width and x.is_contiguous():
        count = x.numel() // width
        step = stride(count, most)
        return x.as_strided((-(-count // step), width), (step * width, 1))
    rows = x.reshape(-1, width)
    return rows[:: stride(rows.shape[0], most)]


def copied_rows(x: Tensor, most: int = MOST_ROWS) -> Tensor:
    """Return a copy of `some_rows`, which may be measured later."""
    return some_rows(x, most).clone(memory_format=torch.contiguous_format)


def wide(x: Tensor) -> Tensor:
    """Return x in float32; float64 is kept."""
    return x if x.dtype == torch.float64 else x.float()


def some_of(values: Tensor | None, most: int = MOST_ROWS) -> Tensor | None:
    """Return the entries of `values` (rows,) for the rows that `some_rows` returns."""
    return None if values is None else values[:: stride(values.shape[0], most)]


def mean_squares(rows: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return mean(x²) of each of n tensors (n, rows, d), in float64 where supported: the squares of an exploding stream
    overflow float32.

    Args:
        counts: which rows (n, rows) count; None means all.
    """
    if counts is not None:
        rows = rows.masked_fill(~counts.unsqueeze(-1), 0)
    squares: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=widest(rows.device)).square()
    if counts is None:
        return squares / max(1, rows[0].numel())
    return squares / (counts.sum(dim=1) * rows.shape[-1]).clamp_min(1)


class Sentinel:
    """A module whose output is only checked for NaNs and infinities."""

    def __init__(self, buffer: StatsBuffer, sentinel: int) -> None:
        self.buffer, self.sentinel = buffer, sentinel

    def see(self, y: Tensor) -> None:
        # For logits over a large vocabulary, some rows are enough.
        self.buffer.sentinel(self.sentinel, y if y.numel() <= LARGE else some_rows(y))


class Copies:
    """Copies some rows of tensors, but not again those of the last one: a block reads what the one before returned."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def clear(self) -> None:
        """Drop the last copy."""
        self._last = None

    def rows(self, x: Tensor) -> Tensor:
        """Return the copy that `copied_rows` makes."""
        if self._last is not None:
            known, version, rows = self._last
            if known() is x and version >= 0 and version == version_of(x):
                return rows
        rows = copied_rows(x)
        self._last = weakref.ref(x), version_of(x), rows
        return rows


class BlockProbe:
    """A block's input and output. `copies` is shared by all blocks of a model."""

    def __init__(self, buffer: StatsBuffer, sentinel: int, index: int, padding: Padding, copies: Copies) -> None:
        self.buffer, self.sentinel, self.index, self.padding, self._copies = buffer, sentinel, index, padding, copies
        buffer.streams[sentinel] = index

    def see(self, y: Tensor, x: Tensor | None = None) -> None:
        """Measure the block's output y and its input x; None if it is unknown or was overwritten."""
        buffer = self.buffer
        buffer.sentinel(self.sentinel, y)
        if not buffer.sampling or y.numel() == 0:
            return
        before = None if x is None or x.shape != y.shape else self._copies.rows(x)
        counts = some_of(self.padding.rows(y.shape[:-1]))
        buffer.batch(self.measure, self, self._copies.rows(y), before, counts)

    @staticmethod
    def measure(sites: Sequence[BlockProbe], after: Tensor, before: Tensor | None, counts: Tensor | None) -> None:
        """Measure rows (n, rows, d) of n blocks' outputs and inputs, of which those count that `counts` (n, rows)
        selects."""
        buffer, blocks, after = sites[0].buffer, [site.index for site in sites], wide(after)
        buffer.add("stream_ms", blocks, mean_squares(after, counts))
        flat = after if counts is None else after.masked_fill(~counts.unsqueeze(-1), math.nan)
        flat = flat.flatten(1)
        few = flat[:, :: stride(flat.shape[1], MEDIAN_OF)].abs()
        buffer.add("stream_median", blocks, few.nanmedian(dim=1).values)
        if before is None:
            return
        before = wide(before)
        buffer.add("input_ms", blocks, mean_squares(before, counts))
        buffer.add("difference_ms", blocks, mean_squares(after - before, counts))
        angles = F.cosine_similarity(after, before, dim=-1).clamp(-1, 1).arccos()
        buffer.add("angle", blocks, (angles.mean(dim=1) if counts is None else mean_over(angles, counts)) / math.pi)

    def see_gradient(self, dy: Tensor) -> None:
        self.buffer.batch(self.measure_gradients, self, copied_rows(dy))

    @staticmethod
    def measure_gradients(sites: Sequence[BlockProbe], rows: Tensor) -> None:
        sites[0].buffer.add_gradient("stream_grad_ms", [site.index for site in sites], mean_squares(rows))

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
        buffer.sentinel(self.sentinel, y)
        if not buffer.sampling or y.numel() == 0:
            return
        counts = some_of(self.padding.rows(y.shape[:-1]))
        buffer.batch(self.measure, self, copied_rows(y), counts, arguments=(f"{self.role}_ms",))
        if hidden is None or self.role != "feed_forward":
            return
        if hidden.is_cpu:  # copies would fill the cache, and with it every batch of other rows
            self.measure_hidden([self], some_rows(hidden, SILENT_ROWS).unsqueeze(0))
        else:
            buffer.batch(self.measure_hidden, self, copied_rows(hidden, SILENT_ROWS))

    @staticmethod
    def measure(sites: Sequence[WriterProbe], rows: Tensor, counts: Tensor | None, key: str) -> None:
        sites[0].buffer.add(key, [site.index for site in sites], mean_squares(rows, counts))

    @staticmethod
    def measure_hidden(sites: Sequence[WriterProbe], rows: Tensor) -> None:
        """Measure the share of dead units in (n, rows, d)."""
        rows = wide(rows)
        sizes = torch.linalg.vector_norm(rows.flatten(1), dim=1, keepdim=True) / max(1, rows[0].numel()) ** 0.5
        silent = rows.abs().amax(dim=1) <= SILENT * sizes
        sites[0].buffer.add("dead_units", [site.index for site in sites], silent.to(torch.float32).mean(dim=1))


class LogitsProbe:
    """The model's output over a vocabulary."""

    def __init__(self, buffer: StatsBuffer) -> None:
        self.buffer = buffer

    def see(self, logits: Tensor) -> None:
        if not self.buffer.sampling or logits.numel() == 0:
            return
        z = wide(some_rows(logits, 64)).logsumexp(dim=-1)
        self.buffer.add("logz_mean", 0, z.mean())
        self.buffer.add("logz", 0, z.gather(0, z.abs().argmax(0, keepdim=True)).squeeze(0))
