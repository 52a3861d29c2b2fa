"""nGPT: a stream, matrices and embeddings of unit length."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.placement.base import Placement, Position, Sublayer

# Initial value of α: it moves x, which has unit length, by a twentieth of its distance to the branch.
ALPHA = 0.05


def unit(x: Tensor, eps: float | None = 1e-6, dim: int = -1) -> Tensor:
    """Return x / √(Σx² + ε) along `dim`, computed at least in float32.

    If `eps` is None, ε is the machine epsilon of that precision.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return (wide * torch.rsqrt(wide.square().sum(dim, keepdim=True) + eps)).to(x.dtype)


class Scale(nn.Module):
    """A trainable vector s · init / scale; the parameter s is initialized to `scale`, so the vector to `init`.

    An optimizer such as Adam changes s by about the learning rate, so the vector changes faster if `scale` is small.
    """

    def __init__(self, width: int, init: float, scale: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((width,), scale))
        self.factor = init / scale

    def forward(self) -> Tensor:
        return self.value * self.factor


class UnitLinear(nn.Linear):
    """s · (x Uᵀ), where U is the weight, scaled to unit length along its dimension of size d_model; there is no bias.

    Args:
        inputs, outputs: the sizes of the matrix.
        dim: the dimension along which U has unit length: −1 for a matrix that reads the stream, 0 for one that writes
            to it.
        eps: ε of `unit`.
        scale: initial value of s, one trainable scale per output; None leaves s out.
    """

    def __init__(
        self, inputs: int, outputs: int, *, dim: int = -1, eps: float | None = 1e-6, scale: float | None = None
    ) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.dim, self.eps = dim, eps
        self.scale = None if scale is None else Scale(outputs, scale, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, unit(self.weight, self.eps, self.dim))
        return y if self.scale is None else y * self.scale().to(y.dtype)

    def no_weight_decay(self) -> set[str]:
        """Name the weight, whose length has no effect."""
        return {"weight"}


class UnitEmbedding(nn.Embedding):
    """An embedding with rows of unit length: `enter` normalizes its output, `normalize_weights` its weight."""


@torch.no_grad()
def normalize_weights(model: nn.Module) -> None:
    """Scale the weights of every UnitLinear and UnitEmbedding to unit length; the model's outputs stay the same.

    nGPT does so after every optimizer step. Without it the weights grow, and the effective learning rate falls.

    Example:
        >>> layer = UnitLinear(4, 3, dim=-1)
        >>> normalize_weights(layer)
        >>> bool((layer.weight.norm(dim=-1) - 1).abs().max() < 1e-5)
        True
    """
    for module in model.modules():
        if isinstance(module, UnitLinear):
            module.weight.copy_(unit(module.weight, module.eps, module.dim))
        elif isinstance(module, UnitEmbedding):
            module.weight.copy_(unit(module.weight))


def keep_normalized(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Register a hook that calls `normalize_weights` after each optimizer step, if the model has weights for it."""
    if any(isinstance(module, (UnitLinear, UnitEmbedding)) for module in model.modules()):

        def after_step(*_: Any) -> None:
            normalize_weights(model)

        optimizer.register_step_post_hook(after_step)


@final
class NGPT(Placement):
    """U(x + α(U(F(x)) − x)) with U(v) = v/‖v‖ and one trainable α per feature, initialized to 0.05; no norm has a gain.

    The sublayers' matrices have unit length as well, with trainable scales. Loshchilov et al. 2024, arXiv 2410.01131.
    """

    final_norm = False
    inner = frozenset({"unit"})

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__(config, width, position)
        self.eps = config.norm_eps
        self.alpha = Scale(width, ALPHA, width**-0.5)

    def forward(self, x: Tensor, F: Sublayer) -> Tensor:
        step = self.alpha().to(x.dtype) * (unit(F(x), self.eps) - x)
        return unit(x + step, self.eps)

    @staticmethod
    def enter(x: Tensor, config: NormConfig) -> Tensor:
        """Return the embeddings, scaled to unit length."""
        return unit(x, config.norm_eps)
