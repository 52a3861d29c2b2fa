"""Placements that normalize only the branch and leave the residual stream as it is."""

from __future__ import annotations

from typing import final

from torch import Tensor

from omninorm.config import NormConfig
from omninorm.layers import build_norm
from omninorm.placement.base import Placement, Position, Sublayer


@final
class NoNorm(Placement):
    """x + F(x): no norm, for comparison."""

    final_norm = False

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        return x + F(x)


@final
class PreNorm(Placement):
    """x + F(N(x)). Xiong et al. 2020, arXiv 2002.04745; μOmni, GPT-2, Llama."""

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm = build_norm(config, width)

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        return x + F(self.norm(x))


@final
class Sandwich(Placement):
    """x + N₂(F(N₁(x))). CogView, arXiv 2105.13290; Gemma-2; Peri-LN, arXiv 2502.02732."""

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm_in = build_norm(config, width)
        self.norm_out = build_norm(config, width)

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        branch: Tensor = self.norm_out(F(self.norm_in(x)))
        return x + branch


@final
class Reordered(Placement):
    """x + N(F(x)), with norms on queries and keys. OLMo 2, arXiv 2501.00656."""

    inner = frozenset({"q", "k"})

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm = build_norm(config, width)

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        branch: Tensor = self.norm(F(x))
        return x + branch


@final
class LayerNormScaling(Placement):
    """x + F(N(x)/√l) in block l. Not for use with scaled initialization. The Curse of Depth, arXiv 2502.05795."""

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm = build_norm(config, width)
        self.scale = position.block**-0.5

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        return x + F(self.norm(x) * self.scale)


@final
class NormFormer(Placement):
    """Attention: x + N₂(F(N₁(x))) with a gain per head. Feed-forward: x + F(N(x)) with a norm on its hidden features.

    Shleifer, Weston and Ott 2021, arXiv 2110.09456.
    """

    inner = frozenset({"heads", "hidden"})

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        wraps = position.role == "attention"
        self.rule = Sandwich(config, width, position) if wraps else PreNorm(config, width, position)

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        y: Tensor = self.rule(x, F)
        return y
