"""The convention of a checkpoint: its format and settings determine how it stores gains, queries and keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omninorm.inspection.against.mlx import is_mlx
from omninorm.inspection.names import is_norm_part
from omninorm.inspection.settings import gain_offset, model_types, setting
from omninorm.inspection.tensors import Checkpoint

# GGUF architectures whose Hugging Face folders store gains to which the norms add 1, with their model types.
_FAMILY_OF = {
    "qwen3next": "qwen3_next", "qwen35": "qwen3_5", "qwen35moe": "qwen3_5_moe",
}  # fmt: skip
# Models whose gains mlx-lm stores with the 1 already added; for Gemma it stores γ − 1.
_MLX_ADDS_ONE = ("qwen3_next", "qwen3_5")
_INTERLEAVED = ("llama",)
_AS_THEY_ARE = re.compile(r"qwen|gemma|phi|gpt2|gptneox|olmo|stablelm|falcon|starcoder|bert")
# Models for which llama.cpp reorders the heads of linear attention, or the rows of the fused qkv.
_REORDERED = ("qwen3next", "qwen35", "qwen35moe", "gptneox", "bloom", "falcon", "mpt")
_REORDERED_ROLES = re.compile(r"\.(attn_qkv|attn_gate|ssm_\w+)(\.|$)")


@dataclass(frozen=True)
class Convention:
    """The convention by which one checkpoint stores its weights.

    Args:
        format: "safetensors", "gguf", "module" or "mlx".
        config: the model's settings, or {}.
        family: settings that name the model type, from this checkpoint or the other one; {} if neither names it.
    """

    format: str
    config: Mapping[str, Any]
    family: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        return next(iter(model_types(self.config)), "")

    @property
    def interleaves(self) -> bool | None:
        """Return whether queries and keys are stored in llama.cpp's order of rows; None if this is unknown."""
        if self.format != "gguf":
            return False
        if self.architecture in _INTERLEAVED:
            return True
        return False if _AS_THEY_ARE.match(self.architecture) else None

    def reorders(self, key: str) -> bool:
        """Return whether llama.cpp reorders rows or columns of this tensor in ways that are not undone here."""
        known = self.format == "gguf" and self.architecture in _REORDERED
        return known and _REORDERED_ROLES.search(key) is not None

    def offset(self, name: str, has_bias: bool) -> float:
        """Return the number that the model adds to a stored gain."""
        if self.format == "gguf" or not is_norm_part(name) or name.endswith(".bias"):
            return 0.0
        if self.format == "mlx" and any(each.startswith(_MLX_ADDS_ONE) for each in model_types(self.family)):
            return 0.0
        return gain_offset(self.family, name, has_bias)

    @property
    def adds_one(self) -> bool:
        """Return whether the norms of this family compute x · (1 + γ)."""
        return gain_offset(self.family, "norm.weight", has_bias=False) > 0.0

    def heads(self) -> tuple[int, int]:
        """Return the numbers of query heads and of key/value heads; 0 if unknown."""
        queries = _count(setting(self.config, "num_attention_heads", "n_head", "n_heads"))
        return queries, _count(setting(self.config, "num_key_value_heads", "n_kv_heads")) or queries


def conventions(a: Checkpoint, b: Checkpoint) -> tuple[Convention, Convention]:
    """Return the conventions of both checkpoints; if one does not name its model type, the other's is used."""
    families = [_family(each.config) for each in (a, b)]
    formats = ["mlx" if is_mlx(each) else each.format for each in (a, b)]
    return (
        Convention(formats[0], a.config, families[0] or families[1]),
        Convention(formats[1], b.config, families[1] or families[0]),
    )


def _family(config: Mapping[str, Any]) -> Mapping[str, Any]:
    types = model_types(config)
    if not types:
        return {}
    return {**config, "model_type": _FAMILY_OF.get(types[0], types[0])} if types[0] in _FAMILY_OF else config


def _count(value: float | None) -> int:
    return int(value) if value is not None and 0 < value < 2**20 else 0
