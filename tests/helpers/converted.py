"""Checkpoints of the same model in several formats: a Hugging Face folder, and GGUF as llama.cpp's converter writes it.

A fault is planted by changing the tensors between reading and writing: `change(tensors)`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Change = Callable[[dict[str, Tensor]], object]
_SMALL = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 16}
_GPT2 = {"vocab_size": 120, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 32}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "llama", _GROUPED),
    "qwen3": ("Qwen3", "qwen3", _GROUPED),
    "gemma": ("Gemma", "gemma", _GROUPED),
    "gemma2": ("Gemma2", "gemma2", _GROUPED),
    "nemotron": ("Nemotron", "nemotron", _GROUPED),
    "olmo2": ("Olmo2", "olmo2", _GROUPED),
    "gpt2": ("GPT2", "gpt2", _GPT2),
    "mixtral": ("Mixtral", "llama", {**_GROUPED, "num_local_experts": 3}),
}
_HEADS, _KV_HEADS = 4, 2


def random_model(family: str) -> torch.nn.Module:
    """Return a transformers model of 3 blocks with random weights, and gains that no two norms share."""
    import transformers

    name, _, sizes = FAMILIES[family]
    head = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**sizes, **tokens))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.02)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1 and "bias" not in key and family not in ("gemma", "gemma2", "nemotron"):
            parameter.data += 1.0
    return model


def write_folder(model: torch.nn.Module, folder: Path, change: Change | None = None, **options: Any) -> Path:
    """Write a Hugging Face folder; options: dtype, metadata of the file, config (settings that are replaced)."""
    model.save_pretrained(folder)
    from safetensors.torch import load_file

    tensors = dict(load_file(folder / "model.safetensors"))
    if change is not None:
        change(tensors)
    dtype = options.get("dtype", torch.float32)
    stored = {name: value.to(dtype).contiguous().clone() for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata=options.get("metadata", {"format": "pt"}))
    config = json.loads((folder / "config.json").read_text()) | options.get("config", {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(model: torch.nn.Module, path: Path, family: str, change: Change | None = None, **options: Any) -> Path:
    """Write GGUF as llama.cpp does; `change` sees the converted tensors. Options: kind, the type of matrices; eps."""
    tensors = converted(model, family)
    if change is not None:
        change(tensors)
    config = model.config
    sizes = {
        "n_layers": config.num_hidden_layers, "width": config.hidden_size, "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "eps": next(v for k in ("rms_norm_eps", "layer_norm_epsilon", "norm_eps") if (v := getattr(config, k, None))),
    }  # fmt: skip
    if family == "llama":  # Thinker reads them
        sizes |= {"hidden": config.intermediate_size, "length": config.max_position_embeddings}
    return write_tensors(path, FAMILIES[family][1], tensors, {**sizes, **options.get("sizes", {})}, options.get("kind"))


def write_tensors(
    path: Path, architecture: str, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any], kind: str | None = None
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(sizes["n_layers"])
    writer.add_embedding_length(sizes["width"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    if "hidden" in sizes:
        writer.add_feed_forward_length(sizes["hidden"])
        writer.add_context_length(sizes["length"])
    layer_norm = architecture in ("gpt2", "nemotron")
    (writer.add_layer_norm_eps if layer_norm else writer.add_layer_norm_rms_eps)(sizes["eps"])
    for name, value in tensors.items():
        array = np.ascontiguousarray(value.float().numpy())
        if kind is not None and value.ndim > 1:
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(model: torch.nn.Module, family: str) -> dict[str, Tensor]:
    """Return the tensors of a model as llama.cpp's converter stores them."""
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == FAMILIES[family][1])
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    tied = model.config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        for part, tensor in _single(name, value.detach().float()):
            theirs = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert theirs is not None, part
            found[theirs] = _stored(family, part, tensor)
    return found


def _single(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Split the stacked gate and up of experts, which GGUF stores as two stacks."""
    stem, _, part = name.rpartition(".experts.")
    if part == "gate_up_proj":
        gate, up = value.chunk(2, dim=1)
        return [(f"{stem}.experts.gate_proj.weight", gate), (f"{stem}.experts.up_proj.weight", up)]
    return [(f"{name}.weight" if stem and not name.endswith("weight") else name, value)]


def _stored(family: str, name: str, value: Tensor) -> Tensor:
    if family in ("gemma", "gemma2", "nemotron") and name.endswith("norm.weight"):
        return value + 1
    if family == "nemotron" and name.endswith("layernorm.weight"):
        return value + 1
    if family in ("llama", "mixtral") and ("q_proj" in name or "k_proj" in name):
        return interleaved(value, _HEADS if "q_proj" in name else _KV_HEADS)
    conv1d = family == "gpt2" and any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return value.T if conv1d else value


_PLAIN = {
    "around_attention.norm": "input_layernorm", "around_feed_forward.norm": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj", "attention.q.": "self_attn.q_proj.", "attention.k.": "self_attn.k_proj.",
    "attention.v.": "self_attn.v_proj.", "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj", "blocks.": "model.layers.", "final_norm.norm": "model.norm",
    "embedding.": "model.embed_tokens.", "head.": "lm_head.",
}  # fmt: skip


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Thinker's tensors under the names that transformers gives them."""
    return _renamed(state, _PLAIN)


def thinker_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of transformers under the names that a Thinker gives them."""
    return _renamed(tensors, {theirs: ours for ours, theirs in _PLAIN.items()})


def _renamed(tensors: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Return tensors under other names: each part that is in a name is replaced."""
    found = {}
    for name, value in tensors.items():
        for old, new in parts.items():
            name = name.replace(old, new)
        found[name] = value
    return found


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Store the two halves of every head alternately, as llama.cpp does for Llama's queries and keys."""
    count, width = rows.shape
    return rows.reshape(heads, 2, count // heads // 2, width).transpose(1, 2).reshape(count, width).contiguous()
