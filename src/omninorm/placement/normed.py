"""Placements that normalize the residual stream itself, in all blocks or in some."""

from __future__ import annotations

import math
from typing import final

from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.layers import build_norm
from omninorm.placement.base import Placement, Position, Sublayer, refuse_stream
from omninorm.placement.plain import PreNorm


@final
class PostNorm(Placement):
    """N(x + F(x)). Vaswani et al. 2017, arXiv 1706.03762."""

    final_norm = False

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm = build_norm(config, width)

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        y: Tensor = self.norm(x + F(x))
        return y


@final
class DeepNorm(Placement):
    """N(αx + F(x)) with α = (2L)^¼ for L blocks.

    The initial weights of value, output and feed-forward projections are divided by (8L)^¼. The constants are those of
    a decoder-only model. Wang et al. 2022, arXiv 2203.00555.
    """

    final_norm = False

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm = build_norm(config, width)
        self.alpha = config.residual_scale or (2 * position.blocks) ** 0.25

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        y: Tensor = self.norm(self.alpha * x + F(x))
        return y

    @staticmethod
    def init_gain(blocks: int, role: str) -> float:
        """Return (8L)^−¼ for "v", "out" and "feed_forward", and 1 for "q" and "k"."""
        return (8 * blocks) ** -0.25 if role in ("v", "out", "feed_forward") else 1.0


@final
class MixNorm(Placement):
    """Post-norm in the first quarter of the blocks (`mix_fraction`, rounded down), pre-norm after.

    Mix-LN, arXiv 2412.13795.
    """

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        # The small term is needed because 0.29 · 100 is 28.999… in floating point.
        is_post = position.block <= math.floor(config.mix_fraction * position.blocks + 1e-9)
        self.rule = PostNorm(config, width, position) if is_post else PreNorm(config, width, position)

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        y: Tensor = self.rule(x, F)
        return y


@final
class HybridNorm(Placement):
    """Attention: x + F(x) with norms on Q, K and V inside F. Feed-forward: y + F(y) with y = N(x). arXiv 2503.04598."""

    inner = frozenset({"q", "k", "v"})

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm = build_norm(config, width) if position.role == "feed_forward" else nn.Identity()

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        y: Tensor = self.norm(x)
        return y + F(y)


@final
class ResiDual(Placement):
    """Two streams, x ← N(x + F(x)) and the sum s ← s + F(x); the model ends with x + N(s). arXiv 2304.14802."""

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm = build_norm(config, width)

    def forward(self, x: tuple[Tensor, Tensor], F: Sublayer) -> tuple[Tensor, Tensor]:
        normed, total = x
        branch = F(normed)
        return self.norm(normed + branch), total + branch

    def check_stream(self, stream: tuple[Tensor, Tensor]) -> None:
        """Raise InputError unless `stream` is a pair of tensors."""
        if not isinstance(stream, tuple) or len(stream) != 2:
            raise refuse_stream("residual", "a pair of tensors", stream)

    @staticmethod
    def enter(x: Tensor, config: NormConfig) -> tuple[Tensor, Tensor]:
        """Return the embeddings for both streams."""
        return x, x

    @staticmethod
    def leave(stream: tuple[Tensor, Tensor], norm: nn.Module) -> Tensor:
        """Return the normalized stream plus the norm of the sum."""
        normed, total = stream
        y: Tensor = normed + norm(total)
        return y


@final
class Keel(Placement):
    """N₂(αx + F(N₁(x))) with α = 2L; in the first block α = 1, and its attention has no N₂. arXiv 2601.19895."""

    final_norm = False

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        is_first = position.block == 1
        self.alpha = 1.0 if is_first else config.residual_scale or 2.0 * position.blocks
        self.norm_in = build_norm(config, width)
        has_outer = not (is_first and position.role == "attention")
        self.norm_out = build_norm(config, width) if has_outer else nn.Identity()

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        y: Tensor = self.norm_out(self.alpha * x + F(self.norm_in(x)))
        return y
