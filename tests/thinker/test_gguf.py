"""GGUF files: logits equal transformers' with the same weights; damaged and unsupported files are refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as hf

from omninorm import Thinker
from omninorm.errors import ConfigError, RunError

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM, "intermediate_size": 64, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "rms_norm_eps": 1e-5,
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12)
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def model(family: str, tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = {"llama": (hf.LlamaForCausalLM, hf.LlamaConfig), "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config)}[family]
    built = kind[0](kind[1](**SIZES, tie_word_embeddings=tied)).eval()
    for parameter in built.parameters():
        if parameter.ndim == 1:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape)
    return built


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter stores queries and keys: row 2i of a head is its row i, row 2i + 1 its row i + half."""
    out = np.empty_like(weight)
    half = weight.shape[0] // heads // 2
    for head in range(heads):
        for i in range(half):
            start = head * 2 * half
            out[start + 2 * i], out[start + 2 * i + 1] = weight[start + i], weight[start + half + i]
    return out


def write(path: Path, family: str = "llama", tied: bool = False, quantized: bool = False, **changes) -> torch.nn.Module:
    """Writes a random model; `changes`: leave_out, add (name → array), keys (metadata added or replaced)."""
    built = model(family, tied)
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in changes.get("keys", {}).items():
        writer.add_string(key, value)
    tensors = {}
    for name, value in built.state_dict().items():
        array = value.float().numpy()
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            part = NAMES[rest.removesuffix(".weight")]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(part)
            if heads and family == "llama":
                array = interleaved(array, heads)
            tensors[f"blk.{number}.{part}.weight"] = array
        else:
            outer = {
                "model.embed_tokens.weight": "token_embd",
                "model.norm.weight": "output_norm",
                "lm_head.weight": "output",
            }
            tensors[f"{outer[name]}.weight"] = array
    if tied:
        tensors.pop("output.weight", None)
    for name in changes.get("leave_out", ()):
        del tensors[name]
    for name, array in {**tensors, **changes.get("add", {})}.items():
        if quantized and array.ndim == 2:
            packed = gguf.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return built


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    theirs = write(tmp_path / "m.gguf", family, tied)
    ours = Thinker.from_pretrained(tmp_path / "m.gguf").eval()
    assert ours.config.tied_head is tied
    assert ours.config.norm.norm_eps == 1e-5
    with torch.no_grad():
        assert torch.allclose(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_quantized_weights_are_within_their_rounding(tmp_path: Path) -> None:
    """Q8_0 rounds to 1/127 of a block's largest weight."""
    theirs = write(tmp_path / "m.gguf", quantized=True)
    ours = Thinker.from_pretrained(tmp_path / "m.gguf", dtype=torch.float64)
    weight = theirs.model.layers[1].self_attn.q_proj.weight.detach()
    error = (ours.blocks[1].attention.q.weight.detach() - weight.double()).abs().max()
    assert 0 < float(error) <= float(weight.abs().max()) / 127
    assert ours.embedding.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"leave_out": ["blk.1.ffn_up.weight"]}, RunError, "its model: blk.1.ffn_up.weight"),
        ({"leave_out": ["token_embd.weight"]}, RunError, "no token_embd.weight"),
        ({"add": {"blk.0.attn_q.bias": np.zeros(32, np.float32)}}, RunError, "its model: blk.0.attn_q.bias"),
        ({"add": {"rope_freqs.weight": np.ones(4, np.float32)}}, ConfigError, "Scaled RoPE"),
        ({"add": {"output_norm.weight": np.ones(31, np.float32)}}, RunError, "shape (32,)"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, ConfigError, "Scaled RoPE"),
    ],
)
def test_an_unsupported_model_is_refused(tmp_path: Path, changes: dict, kind: type[Exception], said: str) -> None:
    write(tmp_path / "m.gguf", **changes)
    with pytest.raises(kind, match=said.replace("(", r"\(").replace(")", r"\)")):
        Thinker.from_pretrained(tmp_path / "m.gguf")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="'mamba'"):
        Thinker.from_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF\x03\0\0\0", b"PK\x03\x04" + bytes(100), b"GGUF" + b"\xff" * 60]
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(RunError, match="whole GGUF file"):
        Thinker.from_pretrained(tmp_path / "m.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"No such file: .*none.gguf"):
        Thinker.from_pretrained(tmp_path / "none.gguf")


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to("m.gguf")
    with pytest.raises(RunError, match=r"m\.gguf"):
        Thinker.from_pretrained(tmp_path / "m.gguf")
