"""Thinker: a small decoder-only transformer with every norm and placement, which also loads Llama and Qwen3 weights.

The names are imported when they are first used, so that ThinkerConfig is available without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from omninorm.thinker.config import ThinkerConfig

if TYPE_CHECKING:
    from omninorm.thinker.cache import KVCache
    from omninorm.thinker.model import Thinker
    from omninorm.thinker.sampling import Sampling

__all__ = ["KVCache", "Sampling", "Thinker", "ThinkerConfig"]

_HOMES = {"KVCache": "cache", "Sampling": "sampling", "Thinker": "model"}
_MODULES = ("attention", "cache", "feed_forward", "init", "model", "rotary", "sampling")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
