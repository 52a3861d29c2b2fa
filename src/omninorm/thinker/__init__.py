"""Thinker: a small decoder-only transformer with every norm and placement, which also loads Llama and Qwen3 weights."""

from omninorm.thinker.cache import KVCache
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.model import Thinker
from omninorm.thinker.sampling import Sampling

__all__ = ["KVCache", "Sampling", "Thinker", "ThinkerConfig"]
