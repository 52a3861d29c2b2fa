"""Tiny models of many architectures of transformers, each with the loss of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 40
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
IDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
Loss = Callable[[nn.Module, int], Tensor]


def tokens(step: int, batch: int = 4, length: int = 16) -> Tensor:
    """Return tokens each of which is repeated once, so that there is something to learn."""
    drawn = torch.randint(3, VOCAB, (batch, length // 2), generator=torch.Generator().manual_seed(step))
    return drawn.repeat_interleave(2, dim=1)


def language_loss(model: nn.Module, step: int) -> Tensor:
    return model(input_ids=tokens(step), labels=tokens(step)).loss  # type: ignore[no-any-return]


def image_loss(model: nn.Module, step: int) -> Tensor:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return model(pixel_values=images, labels=torch.tensor([0, 1, 1, 0])).loss  # type: ignore[no-any-return]


def pair_loss(model: nn.Module, step: int) -> Tensor:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return model(input_ids=tokens(step, length=8), pixel_values=images, return_loss=True).loss  # type: ignore[no-any-return]


def sound_loss(model: nn.Module, step: int) -> Tensor:
    sound = torch.randn(2, 800, generator=torch.Generator().manual_seed(step))
    return model(input_values=sound, labels=torch.tensor([0, 1])).loss  # type: ignore[no-any-return]


def speech_loss(model: nn.Module, step: int) -> Tensor:
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(step))
    return model(input_features=features, labels=tokens(step, 2)).loss  # type: ignore[no-any-return]


def build(config: str, model: str, **settings: Any) -> nn.Module:
    """Return a model of transformers with random weights."""
    import transformers

    torch.manual_seed(0)
    found: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return found.train()


def causal(name: str, **settings: Any) -> tuple[Callable[[], nn.Module], Loss]:
    return lambda: build(f"{name}Config", f"{name}ForCausalLM", **settings), language_loss


def other(config: str, model: str, loss: Loss, **settings: Any) -> tuple[Callable[[], nn.Module], Loss]:
    return lambda: build(config, model, **settings), loss


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_STAGES = {"depths": [1, 2], "num_heads": [2, 4], "embed_dim": 16, "image_size": 32, "patch_size": 2, "window_size": 4}
_WAVES = {
    **{key: value for key, value in SHAPE.items() if key != "vocab_size"},
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "mask_time_prob": 0.0,
}
_WHISPER = {
    **{
        f"{part}_{key}": size
        for part in ("encoder", "decoder")
        for key, size in (("layers", 2), ("attention_heads", 4))
    },
    "vocab_size": VOCAB,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
    **IDS,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_CLIP = {
    "text_config": {**SHAPE, "max_position_embeddings": 16, "eos_token_id": 2},
    "vision_config": {"hidden_size": 32, **IMAGE},
    "projection_dim": 16,
}

# Name → model, its loss, its placement, the lengths of its chains of blocks.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Loss, str | None, list[int]]] = {
    "Gemma 3": (*other("Gemma3TextConfig", "Gemma3ForCausalLM", language_loss, **GROUPED), "sandwich", [4]),
    "Gemma 4": (
        *other("Gemma4TextConfig", "Gemma4ForCausalLM", language_loss, **GROUPED, num_kv_shared_layers=0,
               vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8), "sandwich", [4],
    ),
    "GLM-4": (*causal("Glm4", **GROUPED, **IDS), "sandwich", [4]),
    "OLMo": (*causal("Olmo", **SHAPE, **IDS), "pre", [4]),
    "OLMo 2": (*causal("Olmo2", **SHAPE, **IDS), "reordered", [4]),
    "OLMo 3": (*causal("Olmo3", **SHAPE, **IDS), "reordered", [4]),
    "GPT-NeoX": (*causal("GPTNeoX", **SHAPE), "pre", [4]),
    "Cohere": (*causal("Cohere", **SHAPE, **IDS, num_key_value_heads=2, use_qk_norm=True), "pre", [4]),
    "NanoChat": (*causal("NanoChat", **GROUPED, **IDS), "pre", [4]),
    "Qwen3-MoE": (*causal("Qwen3Moe", **GROUPED, **_MOE), "pre", [4]),
    "Qwen3-Next": (
        *causal("Qwen3Next", **GROUPED, **_MOE, **LINEAR, shared_expert_intermediate_size=16), "pre", [4],
    ),
    "Qwen3.5": (*other("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", language_loss, **GROUPED, **LINEAR), "pre", [4]),
    "gpt-oss": (*causal("GptOss", **GROUPED, num_local_experts=4, num_experts_per_tok=2), "pre", [4]),
    "DeepSeek-V3": (*causal("DeepseekV3", **SHAPE, **_DEEPSEEK), "pre", [4]),
    "Mamba 2": (
        *causal("Mamba2", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, state_size=4, num_heads=8, head_dim=8, chunk_size=16,
                n_groups=2, expand=2), "pre", [4],
    ),
    "Jamba": (
        *causal("Jamba", **SHAPE, **IDS, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, mamba_d_state=4,
                attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_dt_rank=4), "pre", [4],
    ),
    "ModernBERT": (
        *other("ModernBertConfig", "ModernBertForMaskedLM", language_loss, **SHAPE, pad_token_id=0, bos_token_id=1,
               eos_token_id=2, cls_token_id=1, sep_token_id=2), "pre", [4],
    ),
    "Swin": (*other("SwinConfig", "SwinForImageClassification", image_loss, **_STAGES), "pre", [1, 2]),
    "Swin 2": (*other("Swinv2Config", "Swinv2ForImageClassification", image_loss, **_STAGES), "reordered", [1, 2]),
    "ConvNeXt": (
        *other("ConvNextConfig", "ConvNextForImageClassification", image_loss, hidden_sizes=[8, 16, 32],
               depths=[2, 1, 3], num_stages=3), None, [2, 1, 3],
    ),
    "PVT": (
        *other("PvtConfig", "PvtForImageClassification", image_loss, image_size=32, depths=[1, 2, 1, 1],
               hidden_sizes=[8, 16, 32, 32], num_attention_heads=[1, 2, 4, 4], num_labels=2), "pre", [1, 2, 1, 1],
    ),
    "SegFormer": (
        *other("SegformerConfig", "SegformerForImageClassification", image_loss, depths=[1, 2, 1, 1],
               hidden_sizes=[8, 16, 32, 32], num_attention_heads=[1, 2, 4, 4]), "pre", [1, 2, 1, 1],
    ),
    "CLIP": (*other("CLIPConfig", "CLIPModel", pair_loss, **_CLIP), "pre", [4, 3]),
    "Whisper": (*other("WhisperConfig", "WhisperForConditionalGeneration", speech_loss, **_WHISPER), "pre", [2, 2]),
    "wav2vec 2": (*other("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", sound_loss, **_WAVES), "post", [4]),
    "wav2vec 2, stable": (
        *other("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", sound_loss, **_WAVES, feat_extract_norm="layer",
               do_stable_layer_norm=True), "pre", [4],
    ),
}  # fmt: skip
