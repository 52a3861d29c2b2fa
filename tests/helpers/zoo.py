"""Tiny causal language models of transformers' model types, with random weights, gains and biases."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

VOCABULARY, WIDTH = 61, 32
# Every setting that a class has, under the names that classes give it.
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    # GPT-2's names
    "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "d_model": WIDTH, "n_layers": 2,
    "n_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "rotary_dim": 4, "max_seq_len": 64, "num_layers": 2,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_intermediate_size": 24, "expert_ffn_hidden_size": 24, "shared_expert_intermediate_size": 24,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1, "num_dense_layers": 1,
    "decoder_sparse_step": 1, "n_shared_experts": 1, "shared_intermediate_size": 24, "intermediate_size_mlp": 48,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    # linear attention and state spaces
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "state_size": 4, "num_heads": 8, "n_groups": 2, "expand": 2, "mamba_d_state": 4, "mamba_d_head": 8,
    "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_dt_rank": 4, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "mamba_expand": 2, "ssm_state_size": 4, "chunk_size": 8, "mamba_chunk_size": 8, "mamba_d_ssm": 64,
    "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "sliding_window": 8,
    "lru_width": WIDTH, "attention_window_size": 8, "attention_hidden_size": WIDTH,
}  # fmt: skip
# Settings of one class that the common ones do not fit.
_LATENT = {"num_key_value_heads": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_STATES = {"layer_types": ["mamba", "attention"]}
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "longcat_flash": _LATENT | {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2},
    "minicpm3": _LATENT,
    "axk1": _LATENT,
    "axk2": _LATENT,
    "qwen3_next": _MIXED,
    "qwen3_5_text": _MIXED,
    "qwen3_5_moe_text": _MIXED,
    "qwen4_exp_text": _MIXED,
    "granitemoehybrid": _STATES,
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "kimi_linear": {
        "num_experts_per_token": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
# Model types whose class is not named after an automatic mapping's.
TOKENS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


def config(kind: str, **more: Any) -> Any:
    """Return a small configuration of a model type, with more settings."""
    import transformers

    found = transformers.CONFIG_MAPPING[kind]
    known = set(vars(found())) | set(getattr(found, "attribute_map", {}))
    settings = {name: value for name, value in SETTINGS.items() if name in known} | OWN.get(kind, {})
    if "num_experts" in more:  # under every name
        more |= {name: more["num_experts"] for name in ("num_local_experts", "n_routed_experts") if name in settings}
    return found(**settings | more)


def build(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
    """Return a model with gains around 1 and biases around 0."""
    import transformers

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config(kind, **more)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 or "sink" in name:
            parameter.data = (parameter.data.double() + noise).to(parameter.dtype)
        elif float(parameter.detach().abs().max()) < 0.2:  # the usual start of 0.02, or zeros
            parameter.data = noise.to(parameter.dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # a table of experts for tokens, which comes with the weights
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) % 4)
    return model.to(dtype)
