"""The sites: what is measured at an embedding, a block, the layers that write to its stream, and the logits.

Each has a method `see`, which takes the tensors that passed and writes to the board. In every step a sentinel looks at
the largest |x|; in a sampled step the site's statistics are taken from at most some hundred rows.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from omninorm.watch.board import Board

MOST_ROWS = 256
# A hidden unit is silent where it stays below this share of the layer's RMS, for all of so many tokens.
SILENT, SILENT_ROWS = 1e-3, 512
MEDIAN_OF = 4096
LARGE = 2**22


@lru_cache(maxsize=4096)
def stride(count: int, most: int) -> int:
    """The distance at which about `most` of `count` things are read, or somewhat fewer; 1 below twice as many.

    It has no divisor in common with `count`, or it would keep step with what they are made of: with the sequences of a
    batch, and read first tokens only, or with the rows of a matrix, and read one column.
    """
    step = max(1, count // most)
    while math.gcd(step, count) > 1:
        step += 1
    return step


def some_rows(x: Tensor, most: int = MOST_ROWS) -> Tensor:
    """At most about `most` rows of x (…, d), evenly spaced, in float32 (float64 stays): (rows, d)."""
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows[:: stride(rows.shape[0], most)]
    return rows if rows.dtype == torch.float64 else rows.float()


def largest(x: Tensor) -> Tensor:
    """max |x|, NaN if there is one, 0 for an empty tensor."""
    if x.numel() == 0:
        return x.new_zeros(())
    least, most = torch.aminmax(x.detach())
    return torch.maximum(most, -least)


def mean_square(rows: Tensor) -> Tensor:
    """mean(x²), in float64 where there is one: the squares of an exploding stream overflow float32."""
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(rows, dtype=dtype)
    return norm.square() / max(1, rows.numel())


class Sentinel:
    """A module whose output is only looked at for NaNs and infinities."""

    def __init__(self, board: Board, sentinel: int) -> None:
        self.board, self.sentinel = board, sentinel

    def see(self, y: Tensor) -> None:
        # Of logits over a large vocabulary some rows must do.
        self.board.sentinel(self.sentinel, largest(y if y.numel() <= LARGE else some_rows(y)))


class BlockSite:
    """A block's input and output."""

    def __init__(self, board: Board, sentinel: int, index: int) -> None:
        self.board, self.sentinel, self.index = board, sentinel, index

    def see(self, y: Tensor, x: Tensor | None = None) -> None:
        """y: the block's output; x: its input, None where it is not known or was overwritten."""
        board, index = self.board, self.index
        peak = largest(y)
        board.sentinel(self.sentinel, peak)
        if not board.sampling or y.numel() == 0:
            return
        board.peak("stream_max", index, peak)
        after = some_rows(y)
        board.add("stream_ms", index, mean_square(after))
        flat = after.flatten()
        board.add("stream_median", index, flat[:: stride(flat.numel(), MEDIAN_OF)].abs().median())
        if x is None or x.shape != y.shape:
            return
        before = some_rows(x)
        board.add("input_ms", index, mean_square(before))
        board.add("difference_ms", index, mean_square(after - before))
        cosine = F.cosine_similarity(after, before, dim=-1).clamp(-1, 1)
        board.add("angle", index, cosine.arccos().mean() / math.pi)

    def see_gradient(self, dy: Tensor) -> None:
        self.board.add_gradient("stream_grad_ms", self.index, mean_square(some_rows(dy)))

    def see_gradient_if_sampled(self, dy: Tensor) -> None:
        if self.board.sampling:
            self.see_gradient(dy)


class WriterSite:
    """The last layer of an attention ("attention") or feed-forward ("feed_forward"): its output, before the stream."""

    def __init__(self, board: Board, sentinel: int, index: int, role: str) -> None:
        self.board, self.sentinel, self.index, self.role = board, sentinel, index, role

    def see(self, y: Tensor, hidden: Tensor | None = None) -> None:
        """y: the output; hidden: the input of a feed-forward's last layer, its hidden units."""
        board = self.board
        board.sentinel(self.sentinel, largest(y))
        if not board.sampling or y.numel() == 0:
            return
        board.add(f"{self.role}_ms", self.index, mean_square(some_rows(y)))
        if hidden is not None and self.role == "feed_forward":
            rows = some_rows(hidden, SILENT_ROWS)
            silent = rows.abs().amax(0) <= SILENT * torch.linalg.vector_norm(rows) / max(1, rows.numel()) ** 0.5
            board.add("dead_units", self.index, silent.to(torch.float32).mean())


class LogitsSite:
    """The model's output over a vocabulary."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def see(self, logits: Tensor) -> None:
        if not self.board.sampling or logits.numel() == 0:
            return
        z = some_rows(logits, 64).logsumexp(dim=-1)
        self.board.add("logz_mean", 0, z.mean())
        self.board.add("logz", 0, z.gather(0, z.abs().argmax(0, keepdim=True)).squeeze(0))
