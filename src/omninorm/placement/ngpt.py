"""nGPT: a stream, matrices and embeddings of unit length."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.placement.base import Placement, Position, Sublayer

# The initial step along the sphere: ‖x‖ = 1, and α = 0.05 moves x by a twentieth of its distance to the branch.
ALPHA = 0.05


def unit(x: Tensor, eps: float | None = 1e-6, dim: int = -1) -> Tensor:
    """Return x / √(Σx² + ε) along `dim`, computed at least in float32; ε None is that precision's machine epsilon."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return (wide * torch.rsqrt(wide.square().sum(dim, keepdim=True) + eps)).to(x.dtype)


class Scale(nn.Module):
    """A trainable vector of scales s · init / scale, where the parameter s starts at `scale`.

    The optimizer moves s by its learning rate, so that a small `scale` lets the scales move fast.
    """

    def __init__(self, width: int, init: float, scale: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((width,), scale))
        self.factor = init / scale

    def forward(self) -> Tensor:
        return self.value * self.factor


class UnitLinear(nn.Linear):
    """s · (x Uᵀ), where U is the weight with unit length along its width-d_model dimension, without a bias.

    Args:
        inputs, outputs: the sizes of the matrix.
        dim: the dimension that has unit length: −1 for a matrix that reads the stream, 0 for one that writes to it.
        eps: ε of the length.
        scale: initial value of the trainable scales s of the outputs; None leaves s out.
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
    """An embedding with rows of unit length: `enter` normalizes what it returns, `normalize_weights` its weight."""


@torch.no_grad()
def normalize_weights(model: nn.Module) -> None:
    """Scale the weights of every UnitLinear and UnitEmbedding to unit length, which leaves the outputs unchanged.

    nGPT does so after every optimizer step. Without it the weights grow, and the effective learning rate falls.
    """
    for module in model.modules():
        if isinstance(module, UnitLinear):
            module.weight.copy_(unit(module.weight, module.eps, module.dim))
        elif isinstance(module, UnitEmbedding):
            module.weight.copy_(unit(module.weight))


def keep_normalized(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Call `normalize_weights` after every step of the optimizer, if the model has weights of unit length."""
    if any(isinstance(module, (UnitLinear, UnitEmbedding)) for module in model.modules()):

        def after_step(*_: Any) -> None:
            normalize_weights(model)

        optimizer.register_step_post_hook(after_step)


@final
class NGPT(Placement):
    """U(x + α(U(F(x)) − x)) with U(v) = v/‖v‖ and a trainable α per feature, which starts at 0.05; no norm has a gain.

    The sublayers' matrices have unit length too, and scales of their own. Loshchilov et al. 2024, arXiv 2410.01131.
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
        """The embeddings at unit length."""
        return unit(x, config.norm_eps)
