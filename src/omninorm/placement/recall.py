"""Placements that read earlier states of the stream: the embeddings, or the outputs of all previous sublayers."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.layers import build_norm
from omninorm.placement.base import Placement, Position, Sublayer, refuse_stream

# torch.fx records a call of this as a single node, because it cannot trace decisions by dtype.
torch.fx.wrap("softmax")

Pair = tuple[Tensor, Tensor]


@final
class X0(Placement):
    """λx + μx₀ at the start of each block, with the embeddings x₀ and one trainable λ and μ per block; then pre-norm.

    λ is initialized to 1 and μ to 0, so that the model is pre-norm at first. nanochat, modded-nanogpt.
    """

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.norm = build_norm(config, width)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0])) if position.role == "attention" else None

    def forward(self, stream: Pair, F: Sublayer) -> Pair:
        x, x0 = stream
        if self.lambdas is not None:
            x = self.lambdas[0] * x + self.lambdas[1] * x0
        return x + F(self.norm(x)), x0

    def check_stream(self, stream: Pair) -> None:
        """Raise InputError unless `stream` is a pair of tensors."""
        if not isinstance(stream, tuple) or len(stream) != 2:
            raise refuse_stream("x0", "a pair of tensors", stream)

    @staticmethod
    def enter(x: Tensor, config: NormConfig) -> Pair:
        """Return the stream and the embeddings, which are the same at first."""
        return x, x

    @staticmethod
    def leave(stream: Pair, norm: nn.Module) -> Tensor:
        """Return the norm of the stream; the embeddings are not needed any more."""
        y: Tensor = norm(stream[0])
        return y


class DepthAttention(nn.Module):
    """Σᵢ aᵢ vᵢ over the stream's parts vᵢ, with a = softmax(qᵀ N(vᵢ)) and a trainable query q, initialized to 0."""

    def __init__(self, config: NormConfig, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.key_norm = build_norm(config, width)

    def forward(self, stream: tuple[Tensor, ...]) -> Tensor:
        values = torch.stack(stream, -2)
        logits: Tensor = (self.key_norm(values) * self.query.to(values.dtype)).sum(-1)
        return (softmax(logits).unsqueeze(-1) * values).sum(-2)


def softmax(logits: Tensor) -> Tensor:
    """Return the softmax of the last dimension in the dtype of the logits, computed at least in float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=wide).to(logits.dtype)


@final
class AttentionResidual(Placement):
    """F(N(h)), where h is attention over the embeddings and the sums of the previous groups of sublayers.

    A model has `residual_groups` groups. The stream is a tuple: the sum of the current group, then those of earlier
    groups, and last the embeddings. With groups of one sublayer this is the paper's full form, with larger ones its
    block form. Kimi Team 2026, arXiv 2603.15031.
    """

    exit_type = DepthAttention

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        index = 2 * (position.block - 1) + (position.role == "feed_forward")
        size = -(-2 * position.blocks // config.residual_groups)
        self.parts = 1 + -(-index // size)
        self.opens_group = index % size == 0
        self.norm = build_norm(config, width)
        # The first sublayer has only the embeddings to attend to.
        self.attend = DepthAttention(config, width) if index else None

    def forward(self, x: tuple[Tensor, ...], F: Sublayer) -> tuple[Tensor, ...]:
        branch = F(self.norm(x[0] if self.attend is None else self.attend(x)))
        return (branch, *x) if self.opens_group else (x[0] + branch, *x[1:])

    def check_stream(self, stream: tuple[Tensor, ...]) -> None:
        """Raise InputError unless `stream` is a tuple with the embeddings and one tensor for each group so far."""
        if not isinstance(stream, tuple) or len(stream) != self.parts:
            form = f"a tuple of {self.parts} tensor{'s' if self.parts > 1 else ''} here"
            raise refuse_stream("attention_residual", form, stream)

    @staticmethod
    def enter(x: Tensor, config: NormConfig) -> tuple[Tensor, ...]:
        """Return the embeddings as the only element of the tuple."""
        return (x,)
