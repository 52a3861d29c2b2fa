"""Builds a norm module from a NormConfig."""

from __future__ import annotations

import torch
from torch import nn

from omninorm.config import NormConfig
from omninorm.layers.norms import CRMSNorm, LayerNorm, RMSNorm, ScaleNorm
from omninorm.layers.pointwise import DynamicErf, DynamicTanh

# All modules whose parameters are only gains and biases of a norm; `param_groups` finds norms by these types.
NORM_TYPES = (nn.RMSNorm, nn.LayerNorm, CRMSNorm, ScaleNorm, DynamicTanh, DynamicErf)


def build_norm(
    config: NormConfig,
    width: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return one norm of the configured kind over `width` features; nn.Identity for "none".

    Raises:
        ConfigError: width below 1.

    Example:
        >>> build_norm(NormConfig(normalization="rmsnorm", norm_eps=1e-5), 8)
        RMSNorm((8,), eps=1e-05, elementwise_affine=True)
    """
    eps = config.norm_eps
    match config.normalization:
        case "rmsnorm":
            offset, cast = config.gain_offset, config.cast
            return RMSNorm(width, eps, device=device, dtype=dtype, gain_offset=offset, cast=cast)
        case "layernorm":
            return LayerNorm(width, eps, device=device, dtype=dtype)
        case "crmsnorm":
            return CRMSNorm(width, eps, device, dtype)
        case "scalenorm":
            return ScaleNorm(width, eps, device, dtype)
        case "dyt":
            return DynamicTanh(width, device=device, dtype=dtype)
        case "derf":
            return DynamicErf(width, device=device, dtype=dtype)
        case _:
            return nn.Identity()
