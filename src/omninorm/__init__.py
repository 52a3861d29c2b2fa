"""Normalization for PyTorch transformers, from the layer to the training run."""

from omninorm import functional
from omninorm.config import NormConfig
from omninorm.errors import OmninormError
from omninorm.kernels.dispatch import backends, use_backend
from omninorm.layers import CRMSNorm, DynamicErf, DynamicTanh, LayerNorm, RMSNorm, ScaleNorm, param_groups
from omninorm.placement import Block
from omninorm.surgery import swapped
from omninorm.thinker import Thinker, ThinkerConfig
from omninorm.watch import watch

__version__ = "0.1.0"

__all__ = [
    "Block",
    "CRMSNorm",
    "DynamicErf",
    "DynamicTanh",
    "LayerNorm",
    "NormConfig",
    "OmninormError",
    "RMSNorm",
    "ScaleNorm",
    "Thinker",
    "ThinkerConfig",
    "backends",
    "functional",
    "param_groups",
    "swapped",
    "use_backend",
    "watch",
]
