"""RoPE, Su et al. 2021 (arXiv 2104.09864), with the pairs laid out as Llama's checkpoints need them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]
"""cos and signed sin of every position's angles, each (sequence, 1, head_dim) or (batch, sequence, 1, head_dim)."""

# Tables are computed up to this many positions at first, and further when such positions are used: the longest context
# that a file of weights claims need not fit in memory.
_FIRST_ROWS = 8192


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (x_i, x_{i+h/2}) by its position's angle: x · cos + (x with its halves swapped) · (∓sin).

    Shapes: x (batch, sequence, heads, head_dim h), the result likewise. The tables come in float32 and are rounded to
    x's dtype, as transformers does.
    """
    cos, sin = rotation
    low, high = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat((high, low), dim=-1), sin.to(x.dtype))


class Rotary(nn.Module):
    """The tables of cos and sin: position p rotates pair i by the angle p · θ^(−2i/head_dim).

    They are float32 whatever the model's dtype, and not part of the state dict. A table of more than 8,192 positions
    is computed on demand.
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
        # Computed again, because `.to(bfloat16)` would round the tables and `.to_empty()` would leave them undefined.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tabulate(self.cos.device, self._rows)
        return self

    def forward(self, start: int, stop: int, padding: Tensor | None = None) -> Rotation:
        """Return the tables for the slots start … stop−1; a row's positions begin after its `padding` (batch,)."""
        if self._rows < self.length and stop > self._rows:
            with torch.inference_mode(False):  # the tables are used in training later, too
                self._tabulate(self.cos.device, min(self.length, max(stop, 2 * self._rows)))
        if padding is None:
            return self.cos[start:stop], self.sin[start:stop]
        positions = torch.arange(start, stop, device=padding.device) - padding.unsqueeze(1)
        positions = positions.clamp(min=0)
        return self.cos[positions], self.sin[positions]
