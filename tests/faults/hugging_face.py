"""Builders of small transformers models with random weights: bytes as vocabulary, four blocks."""

from __future__ import annotations

import math
from typing import Any

from faults.plain_models import SPREAD
from torch import nn

VOCAB, DEPTH, HEADS, LENGTH = 256, 4, 4, 64
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_CONFIGS, _MODELS = {"Gemma3": "Gemma3Text"}, {"GPT2": "GPT2LMHead"}


def build(name: str, width: int, head: str = "ForCausalLM", **options: Any) -> nn.Module:
    """Return a model, such as "Llama": its config class and its model class are found by that name."""
    import transformers

    if options.pop("scaled", False):
        options["initializer_range"] = SPREAD / math.sqrt(width)
    config = getattr(transformers, f"{_CONFIGS.get(name, name)}Config")(
        **{**_SPECIAL, **_sizes(name, width), **options}
    )
    config.use_cache = False
    model: nn.Module = getattr(transformers, f"{_MODELS.get(name, name)}{head}")(config)
    return model.train()


def _sizes(name: str, width: int) -> dict[str, Any]:
    """Return the model's sizes, by the names that its config uses."""
    if name == "GPT2":
        return {"vocab_size": VOCAB, "n_embd": width, "n_layer": DEPTH, "n_head": HEADS, "n_positions": LENGTH}
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 5 * width // 2,
        "max_position_embeddings": LENGTH,
    }
    if name in ("Llama", "Olmo2", "Gemma2", "Gemma3", "Qwen3", "Qwen3Moe", "Qwen3Next", "Mixtral", "Glm4"):
        sizes["num_key_value_heads"] = HEADS // 2
    if name in ("Gemma2", "Gemma3", "Qwen3", "Qwen3Moe", "Qwen3Next", "Glm4"):
        sizes["head_dim"] = width // HEADS
    return sizes


def mixture(name: str, width: int, **options: Any) -> nn.Module:
    """Return a mixture of four experts, two for each token."""
    experts = "num_local_experts" if name == "Mixtral" else "num_experts"
    sizes = {experts: 4, "num_experts_per_tok": 2, "moe_intermediate_size": width, "intermediate_size": width}
    return build(name, width, **{**sizes, **options})


def qwen3_next(width: int) -> nn.Module:
    """Return a hybrid of gated linear attention and attention, two blocks each in turn."""
    head = width // HEADS
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": head, "linear_value_head_dim": head}
    return mixture("Qwen3Next", width, shared_expert_intermediate_size=width, full_attention_interval=2, **linear)


def deepseek_v3(width: int) -> nn.Module:
    """Return a model with latent attention, a dense first block and routed experts."""
    ranks = {"q_lora_rank": width // 2, "kv_lora_rank": width // 2, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    routing = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = {"moe_intermediate_size": width, "first_k_dense_replace": 1, "v_head_dim": 16}
    return build("DeepseekV3", width, num_key_value_heads=HEADS, **ranks, **routing, **sizes)


def modern_bert(width: int) -> nn.Module:
    """Return a ModernBERT with a local window in every second block."""
    special = {"cls_token_id": 1, "sep_token_id": 2}
    return build(
        "ModernBert", width, "ForMaskedLM", scaled=True, global_attn_every_n_layers=2, local_attention=16, **special
    )


def t5(width: int) -> nn.Module:
    """Return an encoder and a decoder of two blocks each."""
    import transformers

    sizes = {"d_model": width, "d_kv": width // HEADS, "d_ff": 2 * width, "num_layers": 2, "num_heads": HEADS}
    config = transformers.T5Config(vocab_size=VOCAB, use_cache=False, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).train()


def mamba(width: int) -> nn.Module:
    """Return a state-space model of three blocks."""
    return build("Mamba", width, num_hidden_layers=3, state_size=4)


def vit(width: int) -> nn.Module:
    """Return a vision transformer on 16 patches."""
    import transformers

    sizes = {"hidden_size": width, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": 2 * width, "image_size": 24, "patch_size": 6, "num_labels": 8}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).train()


def conv_next(width: int) -> nn.Module:
    """Return a convolutional network with channel-first LayerNorms, in two stages."""
    import transformers

    sizes: dict[str, Any] = {"hidden_sizes": [width // 2, width], "depths": [2, 4], "num_stages": 2}
    config = transformers.ConvNextConfig(patch_size=3, image_size=24, num_labels=8, **sizes)
    return transformers.ConvNextForImageClassification(config).train()


def clip(width: int) -> nn.Module:
    """Return two towers, one for captions and one for images."""
    import transformers

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": HEADS}
    words = {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, **_SPECIAL}
    pixels = {"image_size": 24, "patch_size": 6}
    config = transformers.CLIPConfig(
        text_config={**sizes, **words}, vision_config={**sizes, **pixels}, projection_dim=width // 2
    )
    return transformers.CLIPModel(config).train()
