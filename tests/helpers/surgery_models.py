"""Small models with random weights, gains and biases."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from omninorm import NormConfig, Thinker, ThinkerConfig

VOCABULARY, WIDTH = 61, 32
SHARED = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SHARED, "num_key_value_heads": 2, "head_dim": 8}
TOKENS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
SOUND = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(3))


def _gpt2() -> nn.Module:
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=32, **tokens)
    )


def _opt() -> nn.Module:
    own = {"ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": WIDTH}
    shared = {name: value for name, value in SHARED.items() if name != "intermediate_size"}
    return hf.OPTForCausalLM(hf.OPTConfig(**shared, **own))


def _vit() -> nn.Module:
    shared = {name: value for name, value in SHARED.items() if not name.endswith("token_id") and name != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**shared, image_size=16, patch_size=8))


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=16, d_model=WIDTH, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, max_source_positions=20,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    return hf.models.whisper.modeling_whisper.WhisperEncoder(config)


def _thinker(norm: str) -> nn.Module:
    config = ThinkerConfig(d_model=WIDTH, n_layers=2, n_heads=4, vocab_size=VOCABULARY, norm=NormConfig(norm, "pre"))
    return Thinker(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SHARED, max_position_embeddings=32)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED)),
    "vit": _vit,
    "whisper encoder": _whisper,
    "thinker": lambda: _thinker("rmsnorm"),
    "thinker layernorm": lambda: _thinker("layernorm"),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SHARED)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"})),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SHARED, num_key_value_heads=4)),
}
INPUTS: dict[str, list[Any]] = {"vit": [{"pixel_values": IMAGE}], "whisper encoder": [{"input_features": SOUND}]}


def inputs(name: str) -> list[Any]:
    return INPUTS.get(name, [TOKENS])


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model with random gains around 1 and biases around 0; always the same for the same seed."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name]().eval()
    draw_vectors(model, seed)
    return model.to(dtype)


def draw_vectors(model: nn.Module, seed: int = 0) -> None:
    """Draw gains around 1 and biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for kind, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 1:
                centre = 1.0 if kind == "weight" else 0.0
                drawn = centre + 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.data = drawn.to(parameter.dtype)
