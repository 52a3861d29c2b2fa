"""Checkpoints for the tests: a small Llama-like one with random weights, and transformers' models."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BLOCKS, WIDTH, HIDDEN, TOKENS = 4, 64, 96, 50


def llama_tensors() -> dict[str, Tensor]:
    """Healthy weights, into which tests inject faults."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(TOKENS, WIDTH) * 0.02,
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": torch.randn(TOKENS, WIDTH) * 0.02,
    }
    for block in range(BLOCKS):
        layer = f"model.layers.{block}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}self_attn.{name}.weight"] = torch.randn(WIDTH, WIDTH) * 0.02
        tensors[f"{layer}mlp.up_proj.weight"] = torch.randn(HIDDEN, WIDTH) * 0.02
        tensors[f"{layer}mlp.down_proj.weight"] = torch.randn(WIDTH, HIDDEN) * 0.02
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = torch.ones(WIDTH)
    return tensors


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


def transformers_model(family: str):
    """A transformers model with random weights."""
    import transformers

    small = {"vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    wide = {**small, "intermediate_size": 80, "num_key_value_heads": 2, "head_dim": 12}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    configs = {
        "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, wide),
        "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, wide),
        "Gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, wide),
        "GPT2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"vocab_size": 120, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 40}),
        "Bert": (transformers.BertConfig, transformers.BertForMaskedLM, {**small, "intermediate_size": 80}),
    }  # fmt: skip
    config, model, settings = configs[family]
    return model(config(**settings, **tokens))
