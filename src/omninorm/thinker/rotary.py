"""RoPE, Su et al. 2021 (arXiv 2104.09864), with the pairs of features in the order of Llama's checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]
"""cos and signed sin of every position's angles, each (sequence, 1, head_dim) or (batch, sequence, 1, head_dim)."""

# At first, tables are computed for at most this many positions, and for more when they are used: a checkpoint may claim
# a context whose tables would not fit in memory.
_FIRST_ROWS = 8192


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (x_i, x_{i+h/2}) by its position's angle: x · cos + (x with its halves swapped) · (∓sin).

    x and the result have the shape (batch, sequence, heads, head_dim h). The float32 tables are rounded to x's dtype,
    as in transformers.
    """
    cos, sin = rotation
    low, high = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat((high, low), dim=-1), sin.to(x.dtype))


class Rotary(nn.Module):
    """The tables of cos and sin: position p rotates pair i by the angle p · θ^(−2i/head_dim).

    They are float32 for any dtype of the model, and not part of the state dict. Positions from 8,192 on are computed
    when they are first used.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, length: int, theta: float, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.length = length
        self.theta = theta
        self._tabulate(device, min(length, _FIRST_ROWS))

    def _tabulate(self, device: torch.device | str | None, rows: int) -> None:
        self._rows = rows
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        angles = torch.outer(
            torch.arange(rows, dtype=torch.float32, device=device), 1.0 / float(self.theta) ** exponents
        )
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1).unsqueeze(1), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1).unsqueeze(1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # Compute the tables again, because `.to(bfloat16)` would round them and `.to_empty()` leave them undefined.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tabulate(self.cos.device, self._rows)
        return self

    def forward(self, start: int, stop: int, padding: Tensor | None = None) -> Rotation:
        """Return the tables for the slots start … stop−1; the positions of a row start after its `padding` (batch,)."""
        if self._rows < self.length and stop > self._rows:
            with torch.inference_mode(False):  # the tables must also be usable in training
                self._tabulate(self.cos.device, min(self.length, max(stop, 2 * self._rows)))
        if padding is None:
            return self.cos[start:stop], self.sin[start:stop]
        positions = torch.arange(start, stop, device=padding.device) - padding.unsqueeze(1)
        positions = positions.clamp(min=0)
        return self.cos[positions], self.sin[positions]
