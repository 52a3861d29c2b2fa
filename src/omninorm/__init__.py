"""Normalization for PyTorch transformers, from the layer to the training run."""

import importlib as _importlib
import os as _os
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from omninorm.config import NormConfig
from omninorm.errors import OmninormError
from omninorm.monitor import watch

if _TYPE_CHECKING:
    from omninorm import functional
    from omninorm.kernels.dispatch import backend_for, backends, use_backend
    from omninorm.layers import CRMSNorm, DynamicErf, DynamicTanh, GatedRMSNorm, LayerNorm, RMSNorm, ScaleNorm
    from omninorm.layers import param_groups as param_groups
    from omninorm.placement import Block
    from omninorm.surgery import swapped
    from omninorm.thinker import Thinker, ThinkerConfig

__version__ = "0.1.0"

__all__ = [
    "Block",
    "CRMSNorm",
    "DynamicErf",
    "DynamicTanh",
    "GatedRMSNorm",
    "LayerNorm",
    "NormConfig",
    "OmninormError",
    "RMSNorm",
    "ScaleNorm",
    "Thinker",
    "ThinkerConfig",
    "backend_for",
    "backends",
    "functional",
    "param_groups",
    "swapped",
    "use_backend",
    "watch",
]

# The names whose modules import torch, which takes seconds, and the modules that define them.
_HOMES = {
    **dict.fromkeys(("backend_for", "backends", "use_backend"), "kernels.dispatch"),
    **dict.fromkeys(
        ("CRMSNorm", "DynamicErf", "DynamicTanh", "GatedRMSNorm", "LayerNorm", "RMSNorm", "ScaleNorm", "param_groups"),
        "layers",
    ),
    "Block": "placement",
    "swapped": "surgery",
    **dict.fromkeys(("Thinker", "ThinkerConfig"), "thinker"),
}
_MODULES = ("functional", "kernels", "layers", "placement", "surgery", "thinker")


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return _importlib.import_module(f"omninorm.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'omninorm' has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"omninorm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


def _is_command() -> bool:
    """Return whether this process runs the `omninorm` command, which prints its help without loading torch."""
    program = _sys.argv[0] if getattr(_sys, "argv", None) else ""
    if program == "-m":
        start = _sys.orig_argv.index("-m") if "-m" in _sys.orig_argv else -1
        return _sys.orig_argv[start + 1 : start + 2] == ["omninorm"]
    return _os.path.splitext(_os.path.basename(program))[0] == "omninorm"


# In a program other than the command, import everything now: this registers omninorm's operators with torch, which
# exported programs need before they can be loaded.
if not _is_command():
    for _name in (*_MODULES, *_HOMES):
        __getattr__(_name)
