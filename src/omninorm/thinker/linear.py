"""The matrices of a Thinker: plain ones, or those of nGPT with unit length."""

from __future__ import annotations

from torch import nn

from omninorm.placement import inner_norms
from omninorm.placement.ngpt import UnitLinear
from omninorm.thinker.config import ThinkerConfig


def build_linear(
    config: ThinkerConfig, inputs: int, outputs: int, *, writes: bool = False, scale: float | None = None
) -> nn.Linear:
    """Return a linear layer without a bias.

    Args:
        config: the Thinker's config.
        inputs, outputs: the sizes of the matrix.
        writes: whether the layer writes to the residual stream; otherwise it reads from it.
        scale: initial value of the trainable scales that nGPT applies to the outputs; None means no scales.
    """
    if "unit" not in inner_norms(config.norm):
        return nn.Linear(inputs, outputs, bias=False)
    return UnitLinear(inputs, outputs, dim=0 if writes else -1, eps=config.norm.norm_eps, scale=scale)
