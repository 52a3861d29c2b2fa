"""The smallest models in other programs' formats: a Hugging Face folder and a GGUF file, written without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "layer_types": ["full_attention", "full_attention"],
    "rope_scaling": None,
}
_BLOCK = {
    "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12), "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
}  # fmt: skip
_GGUF_BLOCK = {
    "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_gate": (12, 8),
    "ffn_up": (12, 8), "ffn_down": (8, 12), "attn_norm": (8,), "ffn_norm": (8,),
}  # fmt: skip
GGUF_SIZES = {
    "context_length": 32, "embedding_length": 8, "block_count": 2, "feed_forward_length": 12,
    "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 4, "rope.dimension_count": 4,
}  # fmt: skip
# A byte-level tokenizer: a, b, "ab", a space, and a special token.
WORDS = ["<|end|>", "a", "b", "ab", "Ġ"]


def hugging_face(folder: Path, tokenizer: bool = True) -> Path:
    """Write a Llama folder of 2 layers: config.json, two shards with their index, and tokenizer.json."""
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(16, 8), "model.norm.weight": torch.ones(8)}
    shards = {"model-1.safetensors": tensors, "model-2.safetensors": {}}
    for layer, shard in enumerate(shards.values()):
        shard |= {f"model.layers.{layer}.{name}.weight": torch.randn(shape) for name, shape in _BLOCK.items()}
    for name, shard in shards.items():
        save_file(shard, folder / name)
    weight_map = {tensor: name for name, shard in shards.items() for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return folder


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    """Return the content of a byte-level BPE tokenizer.json."""
    special = {"id": 0, "content": WORDS[0], "single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{**special, "normalized": False, "special": True}],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {word: index for index, word in enumerate(WORDS)}, "merges": [["a", "b"]]},
        **changes,
    }  # fmt: skip


def gguf_file(path: Path, sizes: dict[str, Any] | None = None) -> Path:
    """Write a llama GGUF file of 2 layers with a tokenizer; `sizes` replaces some of its sizes."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {**GGUF_SIZES, **(sizes or {})}.items():
        key = f"llama.{name}"
        if isinstance(value, int) and not isinstance(value, bool):
            (writer.add_uint32 if value < 2**32 else writer.add_uint64)(key, value)
        else:
            adds = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, list: writer.add_array}
            adds[type(value)](key, value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 1, 1, 1, 1])
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (16, 8), "output_norm": (8,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in _GGUF_BLOCK.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
