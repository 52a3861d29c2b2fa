"""Placements that read earlier states of the stream: the embeddings, or the outputs of all sublayers before."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.layers import build_norm
from omninorm.placement.base import Placement, Position, Sublayer, refuse_stream

Pair = tuple[Tensor, Tensor]


@final
class X0(Placement):
    """λx + μx₀ at the start of each block, with the embeddings x₀ and one trainable λ and μ per block; then pre-norm.

    λ starts at 1 and μ at 0, so that the model starts as pre-norm. nanochat, modded-nanogpt.
    """

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm = build_norm(config, width)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0])) if position.role == "attention" else None

    def forward(self, x: Pair, F: Sublayer) -> Pair:
        x, x0 = x
        if self.lambdas is not None:
            x = self.lambdas[0] * x + self.lambdas[1] * x0
        return x + F(self.norm(x)), x0

    def check_stream(self, stream: Pair) -> None:
        """Raise InputError unless `stream` is a pair of tensors."""
        if not isinstance(stream, tuple) or len(stream) != 2:
            raise refuse_stream("x0", "a pair of tensors", stream)

    @staticmethod
    def enter(x: Tensor, config: NormConfig) -> Pair:
        """The stream and the embeddings, which are the same at first."""
        return x, x

    @staticmethod
    def leave(stream: Pair, norm: nn.Module) -> Tensor:
        """The norm of the stream, without the embeddings."""
        y: Tensor = norm(stream[0])
        return y
