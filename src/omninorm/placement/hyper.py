"""Hyper-connections: n parallel residual streams. Gates determine how each sublayer reads, mixes and writes them."""

from __future__ import annotations

import itertools
from typing import final

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.functional import rms_norm
from omninorm.layers import build_norm
from omninorm.layers.tracing import Proxy
from omninorm.placement.base import Placement, Position, Sublayer, refuse_stream

# Constants of DeepSeek V4 and GLM-5: steps of the Sinkhorn-Knopp iteration, and ε of its sums.
SINKHORN_STEPS = 20
SINKHORN_EPS = 1e-6
# Standard deviation of the gates' matrices at initialization, as transformers draws them.
GATE_STD = 0.02


# torch.fx records calls of these as single nodes, because it cannot trace decisions by dtype, or autocast.
for leaf in ("gate_logits", "mixed"):
    torch.fx.wrap(leaf)


class Streams(Placement):
    """Base class for a stream X (..., n, width), with n = `streams`; at first it is n copies of the embeddings."""

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.name, self.shape = config.norm_placement, (config.streams, width)

    def check_stream(self, stream: Tensor) -> None:
        """Raise InputError unless `stream` is a tensor (..., n, width)."""
        if not isinstance(stream, Proxy) and (not isinstance(stream, Tensor) or stream.shape[-2:] != self.shape):
            raise refuse_stream(self.name, f"a tensor of shape (..., {self.shape[0]}, {self.shape[1]})", stream)

    @staticmethod
    def enter(x: Tensor, config: NormConfig) -> Tensor:
        """Return n copies of the embeddings, (..., n, width)."""
        return x.unsqueeze(-2).repeat_interleave(config.streams, -2)


def drawn(*shape: int) -> nn.Parameter:
    """Return a matrix of gates, randomly initialized."""
    return nn.Parameter(torch.randn(shape) * GATE_STD)


def sinkhorn(logits: Tensor) -> Tensor:
    """Return matrices (..., n, n) whose rows and columns sum to 1: the row-wise softmax, rescaled by Sinkhorn-Knopp."""
    y = logits.softmax(-1) + SINKHORN_EPS
    y = y / (y.sum(-2, keepdim=True) + SINKHORN_EPS)
    for _ in range(SINKHORN_STEPS - 1):
        y = y / (y.sum(-1, keepdim=True) + SINKHORN_EPS)
        y = y / (y.sum(-2, keepdim=True) + SINKHORN_EPS)
    return y


class Gates(nn.Module):
    """α · (x̃ φᵀ) + b with the normalized streams x̃, flattened; one α for each of the `sizes` parts of the output.

    At initialization φ is drawn with a standard deviation of 0.02, b = 0 and α = 1.
    """

    def __init__(self, config: NormConfig, width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.eps, self.sizes = config.norm_eps, sizes
        self.phi = drawn(sum(sizes), config.streams * width)
        self.bias = nn.Parameter(torch.zeros(sum(sizes)))
        self.alpha = nn.Parameter(torch.ones(len(sizes)))

    def forward(self, streams: Tensor) -> list[Tensor]:
        """Map streams (..., n, width) to one tensor (..., size) for each size, at least in float32."""
        logits = gate_logits(streams, self.phi, self.eps)
        ends = itertools.accumulate(self.sizes)
        parts = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        return [self.alpha[at] * logits[..., part] + self.bias[part] for at, part in enumerate(parts)]

    def no_weight_decay(self) -> set[str]:
        """Name the gates' matrix."""
        return {"phi"}


def gate_logits(streams: Tensor, phi: Tensor, eps: float | None) -> Tensor:
    """Return x̃ φᵀ with the normalized streams x̃, flattened, at least in float32."""
    wide = streams.float() if streams.dtype in (torch.float16, torch.bfloat16) else streams
    with torch.autocast(streams.device.type, enabled=False):
        return functional.linear(rms_norm(wide.flatten(-2), None, eps), phi.to(wide.dtype))


def weighted_sum(weights: Tensor, streams: Tensor) -> Tensor:
    """Return Σⱼ wⱼ Xⱼ, (..., width), in the dtype of the streams."""
    return (weights.to(streams.dtype).unsqueeze(-1) * streams).sum(-2)


class GatedSum(nn.Module):
    """Σⱼ (σ(α x̃ φⱼᵀ + bⱼ) + ε) Xⱼ: turns the n streams into one tensor after the last block, as in DeepSeek V4."""

    def __init__(self, config: NormConfig, width: int) -> None:
        super().__init__()
        self.gates = Gates(config, width, (config.streams,))

    def forward(self, streams: Tensor) -> Tensor:
        (read,) = self.gates(streams)
        return weighted_sum(read.sigmoid() + SINKHORN_EPS, streams)


@final
class MHC(Streams):
    """Rᵀ X + h ⊗ F(N(Σⱼ gⱼ Xⱼ)) over n streams X, with gates from X: g = σ(·) + ε, h = 2σ(·) and R doubly stochastic.

    Manifold-constrained hyper-connections, Xie et al. 2025, arXiv 2512.24880; DeepSeek V4, GLM-5.
    """

    exit_type = GatedSum

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        n = config.streams
        self.norm = build_norm(config, width)
        self.gates = Gates(config, width, (n, n, n * n))

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        read, write, mix = self.gates(x)
        branch = F(self.norm(weighted_sum(read.sigmoid() + SINKHORN_EPS, x)))
        write = (2 * write.sigmoid()).to(x.dtype)
        kept = mixed(sinkhorn(mix.unflatten(-1, (-1, self.shape[0]))), x)
        y: Tensor = kept + write.unsqueeze(-1) * branch.unsqueeze(-2)
        return y


def mixed(mix: Tensor, streams: Tensor) -> Tensor:
    """Return Σⱼ Rⱼₖ Xⱼ for each stream k in the dtype of the streams; autocast must not round them."""
    with torch.autocast(streams.device.type, enabled=False):
        return mix.to(streams.dtype).mT @ streams


class GatedRead(nn.Module):
    """meanⱼ σ(U silu(D x̃/n))ⱼ ⊙ x̃ⱼ with x̃ⱼ = Nⱼ(Xⱼ), a norm for each stream, and matrices D and U of low rank.

    At initialization D and U are drawn with a standard deviation of 0.02.
    """

    def __init__(self, config: NormConfig, width: int) -> None:
        super().__init__()
        rank = -(-5 * width // 32) if config.gate_rank is None else config.gate_rank
        self.norms = nn.ModuleList(build_norm(config, width) for _ in range(config.streams))
        self.down, self.up = drawn(rank, config.streams * width), drawn(config.streams * width, rank)

    def normed(self, streams: Tensor) -> Tensor:
        """Return x̃, (..., n, width)."""
        return torch.stack([norm(streams.select(-2, at)) for at, norm in enumerate(self.norms)], -2)

    def read(self, normed: Tensor) -> Tensor:
        """Map x̃ (..., n, width) to the gated mean, (..., width)."""
        low = functional.silu(functional.linear(normed.flatten(-2), self.down) / normed.shape[-2])
        gate = functional.linear(low, self.up).sigmoid().reshape(normed.shape)
        return (gate * normed).mean(-2)

    def forward(self, streams: Tensor) -> Tensor:
        return self.read(self.normed(streams))

    def no_weight_decay(self) -> set[str]:
        """Name the gates' matrices."""
        return {"down", "up"}


@final
class Hyper(Streams):
    """Xⱼ + 2σ(W x̃/n)ⱼ · F(y) over n streams, where y is a gated mean of the normalized streams x̃ (`GatedRead`).

    W is drawn with a standard deviation of 0.02. Gated hyper-connections; Qwen4 (preview).
    """

    final_norm = False
    exit_type = GatedRead

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.reader = GatedRead(config, width)
        self.inject = drawn(config.streams, config.streams * width)

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        normed = self.reader.normed(x)
        branch = F(self.reader.read(normed))
        write = 2 * (functional.linear(normed.flatten(-2), self.inject) / x.shape[-2]).sigmoid()
        return x + write.unsqueeze(-1) * branch.unsqueeze(-2)

    def no_weight_decay(self) -> set[str]:
        """Name the matrix W of the gates on the sublayer's output."""
        return {"inject"}
