"""Reads a model's settings: from transformers' config.json, from omninorm's runs, or from GGUF under the same names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon", "norm_eps")
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Model types of transformers whose norms compute x̂ · (1 + γ'), where γ' is the stored gain.
_OFFSET = (
    "gemma", "gemma2", "gemma2_text", "gemma3", "gemma3_text", "paligemma", "recurrent_gemma", "t5gemma", "t5gemma2",
    "vaultgemma", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "minimax_m3_vl",
    "minimax_m3_vl_text", "qwen4_exp", "qwen4_exp_text", "step3p5", "step3p7",
)  # fmt: skip
# Model types whose LayerNorms, which have a bias, compute x̂ · (1 + γ') + β.
_OFFSET_LAYER_NORM = ("nemotron",)
# Norms in these models whose gain has no offset.
_PLAIN = ("vision", "linear_attn", "visual")


def norm_eps(config: Mapping[str, Any]) -> float | None:
    """Return ε of the model's norms, or None if the settings do not contain it."""
    return next((value for key in _EPS if (value := _number(config, key)) is not None), None)


def count_of_blocks(config: Mapping[str, Any]) -> int | None:
    """Return the number of blocks, or None if the settings do not contain it."""
    found = next((value for key in _BLOCKS if (value := _number(config, key)) is not None), None)
    return None if found is None or not math.isfinite(found) else int(found)


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether config.json ties the head to the embedding."""
    return config.get("tie_word_embeddings") is True


def gain_offset(config: Mapping[str, Any], name: str, has_bias: bool) -> float:
    """Return the number that is added to a stored gain: 1 for Gemma's RMSNorms and Nemotron's LayerNorms, else 0."""
    types = [part.get("model_type") for part in _parts(config)]
    if any(each in _OFFSET_LAYER_NORM for each in types):
        return 1.0
    shifted = any(each in _OFFSET for each in types)
    return 1.0 if shifted and not has_bias and not any(word in name for word in _PLAIN) else 0.0


def setting(config: Mapping[str, Any], *keys: str) -> float | None:
    """Return the first of these settings that is a number, including nested settings, or None."""
    return next((value for key in keys if (value := _number(config, key)) is not None), None)


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Return the model types that the settings name, such as ["gemma3", "gemma3_text"]."""
    return [str(part["model_type"]) for part in _parts(config) if isinstance(part.get("model_type"), str)]


def _number(config: Mapping[str, Any], key: str) -> float | None:
    for part in _parts(config):
        value = part.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value) if abs(value) < 1e300 else math.inf
    return None


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings and the nested ones: a run's model and its norms, a multimodal model's text part."""
    nested = [config, config.get("text_config"), config.get("model")]
    model = config.get("model")
    nested.append(model.get("norm") if isinstance(model, Mapping) else None)
    nested += [part.get("rope_parameters") for part in nested[:2] if isinstance(part, Mapping)]
    return [part for part in nested if isinstance(part, Mapping)]
