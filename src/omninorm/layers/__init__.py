"""The norms as modules: parameters and initialization; the arithmetic is in `omninorm.functional`."""

from omninorm.layers.build import NORM_TYPES, build_norm
from omninorm.layers.gated import GatedRMSNorm
from omninorm.layers.groups import param_groups
from omninorm.layers.hub import register_hub_layers
from omninorm.layers.norms import CRMSNorm, LayerNorm, RMSNorm, ScaleNorm
from omninorm.layers.pointwise import DynamicErf, DynamicTanh

__all__ = [
    "NORM_TYPES",
    "CRMSNorm",
    "DynamicErf",
    "DynamicTanh",
    "GatedRMSNorm",
    "LayerNorm",
    "RMSNorm",
    "ScaleNorm",
    "build_norm",
    "param_groups",
    "register_hub_layers",
]
