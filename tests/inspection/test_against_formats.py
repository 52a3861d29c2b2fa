"""compare_weights matches fused, stacked, renamed and quantized tensors, and reports settings and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import llama_tensors
from helpers.converted import random_model, thinker_names, write_folder, write_gguf, write_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omninorm import Thinker, ThinkerConfig
from omninorm.errors import InputError, RunError
from omninorm.inspection import compare_weights


def folder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, **metadata: str) -> Path:
    path.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors", metadata)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def varied(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


def qwen3_next() -> dict[str, Tensor]:
    """The norms of two blocks as transformers stores them, γ − 1, and the plain gain of linear attention."""
    tensors = {"model.embed_tokens.weight": torch.randn(30, 64), "model.norm.weight": torch.randn(64) * 0.2}
    for block in range(2):
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm"):
            tensors[f"model.layers.{block}.{name}.weight"] = torch.randn(64) * 0.2
        tensors[f"model.layers.{block}.linear_attn.norm.weight"] = 1 + torch.randn(64) * 0.2
    return tensors


def shifted(tensors: dict[str, Tensor], amount: float) -> dict[str, Tensor]:
    plus = {name: value + amount for name, value in tensors.items() if "norm" in name and "linear" not in name}
    return {**tensors, **plus}


def test_mlx_export_of_qwen3_next_stores_the_1_and_twice_is_named(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_next", "rms_norm_eps": 1e-6}
    original = folder(tmp_path / "hf", qwen3_next(), config, format="pt")
    right = folder(tmp_path / "right", shifted(load_file(original / "model.safetensors"), 1.0), config, format="mlx")
    twice = folder(tmp_path / "twice", shifted(load_file(original / "model.safetensors"), 2.0), config, format="mlx")
    assert compare_weights(original, right).differences == []
    (found,) = compare_weights(original, twice).differences
    assert found.sentence.startswith("7 of 9 norms are exactly 1 higher in B: the +1 offset was applied twice")
    assert "linear_attn.norm.weight` and" in found.sentence
    without = folder(tmp_path / "without", load_file(original / "model.safetensors"), config, format="mlx")
    (found,) = compare_weights(original, without).differences
    assert found.sentence.startswith("7 of 9 norms are exactly 1 lower in B: the +1 offset was not applied")


def quantize_mlx(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack as MLX does: w = scale · q + bias by group, q in a stream of bits with the lowest first."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    numbers = ((groups - low) / scale).round().to(torch.int64).reshape(rows, columns)
    words = torch.zeros(rows, columns * bits // 32, dtype=torch.int64)
    for column in range(columns):
        for bit in range(bits):
            word, place = divmod(column * bits + bit, 32)
            words[:, word] |= ((numbers[:, column] >> bit) & 1) << place
    return words.to(torch.uint32), scale.squeeze(2), low.squeeze(2)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_mlx_quantization_is_read_and_does_not_matter(tmp_path: Path, bits: int) -> None:
    tensors = llama_tensors()
    quantized: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.ndim == 2 and value.shape[1] == 64:
            parts = quantize_mlx(value, bits, 32)
            stem = name.removesuffix(".weight")
            quantized |= {name: parts[0], f"{stem}.scales": parts[1], f"{stem}.biases": parts[2]}
        else:
            quantized[name] = value
    config = {"model_type": "llama", "rms_norm_eps": 1e-6}
    original = folder(tmp_path / "hf", tensors, config)
    both = folder(tmp_path / "mlx", quantized, {**config, "quantization": {"group_size": 32, "bits": bits}})
    found = compare_weights(original, both)
    assert (found.differences, found.not_compared, found.formats) == ([], [], ("safetensors", "mlx"))
    assert len(found.results) == len(tensors)
    largest = max(row["largest"] for row in found.errors())
    assert 0.3 / 2**bits < largest < 3 / 2**bits


def test_fused_qkv_and_gate_up_are_compared_with_single_matrices(tmp_path: Path) -> None:
    model = random_model("qwen3")
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    fused = {name: value for name, value in tensors.items() if not any(x in name for x in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))}  # fmt: skip
    for block in range(3):
        layer = f"model.layers.{block}."
        fused[f"{layer}self_attn.qkv_proj.weight"] = torch.cat(
            [tensors[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"]
        )
        fused[f"{layer}mlp.gate_up_proj.weight"] = torch.cat(
            [tensors[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        )
    original = write_folder(model, tmp_path / "hf")
    found = compare_weights(original, folder(tmp_path / "fused", fused))
    assert (found.differences, found.matched()["split from a fused tensor"]) == ([], 3 * 5)
    fused["model.layers.1.mlp.gate_up_proj.weight"] = fused["model.layers.1.mlp.gate_up_proj.weight"].roll(96, 0)
    (difference,) = compare_weights(original, folder(tmp_path / "swapped", fused)).differences
    assert difference.sentence.startswith("`blk.*.ffn_gate.weight` and `blk.*.ffn_up.weight` are swapped in B (1 ×)")


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_are_compared_with_single_ones(tmp_path: Path, transposed: bool) -> None:
    stacked, single = {}, {}
    for block in range(2):
        layer = f"model.layers.{block}.mlp."
        gates, downs = torch.randn(4, 2 * 40, 32), torch.randn(4, 32, 40)
        stacked[f"{layer}experts.gate_up_proj"] = gates.transpose(1, 2) if transposed else gates
        stacked[f"{layer}experts.down_proj"] = downs.transpose(1, 2) if transposed else downs
        stacked[f"{layer}gate.weight"] = single[f"{layer}gate.weight"] = torch.randn(4, 32)
        for expert in range(4):
            for name, value in zip(("gate", "up", "down"), (*gates[expert].chunk(2), downs[expert]), strict=True):
                single[f"{layer}experts.{expert}.{name}_proj.weight"] = value
    found = compare_weights(folder(tmp_path / "a", single), folder(tmp_path / "b", stacked))
    assert found.differences == []
    assert len(found.results) == 2 * (1 + 3 * 4)
    stacked["model.layers.1.mlp.experts.down_proj"][2] *= 3
    (difference,) = compare_weights(tmp_path / "a", folder(tmp_path / "c", stacked)).differences
    assert "`blk.*.ffn_down_exps.weight` in 1 of 8 places is 3 times as large in B" in difference.sentence


def test_omninorm_model_is_compared_with_gguf(tmp_path: Path) -> None:
    model = random_model("llama")
    path = write_gguf(model, tmp_path / "m.gguf", "llama", sizes={"eps": 1e-6})
    ours = Thinker(ThinkerConfig(vocab_size=120, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96, feed_forward="swiglu", max_seq_len=32, tied_head=False))  # fmt: skip
    ours.load_state_dict(thinker_names(model.state_dict()), strict=False)
    found = compare_weights(ours, path)
    assert found.differences == []
    assert len(found.results) == len(list(model.parameters()))


def test_unknown_names_are_matched_by_their_values(tmp_path: Path) -> None:
    strange, plain = {}, {}
    for block in range(3):
        for ours, theirs, shape in (("mixer.alpha", "op.first", (20, 12)), ("mixer.omega", "op.second", (20, 12))):
            value = torch.randn(shape)
            plain[f"layers.{block}.{ours}.weight"], strange[f"blocks.{block}.{theirs}.kernel"] = value, value.T
        plain[f"layers.{block}.scale_norm.g"] = strange[f"blocks.{block}.my_norm.g"] = torch.randn(12)
    found = compare_weights(folder(tmp_path / "a", plain), folder(tmp_path / "b", strange))
    assert found.differences == []
    assert {(each.a.key.partition(".0.")[2], each.b.key.partition(".0.")[2]) for each in found.results if ".0." in each.a.key} == {
        ("mixer.alpha.weight", "op.first.kernel"), ("mixer.omega.weight", "op.second.kernel"), ("scale_norm.g", "my_norm.g"),
    }  # fmt: skip
    strange["blocks.1.my_norm.g"] = strange["blocks.1.my_norm.g"] + 1
    (difference,) = compare_weights(tmp_path / "a", folder(tmp_path / "c", strange)).differences
    assert difference.sentence.startswith("1 of 3 norms is exactly 1 higher in B: either the files store γ − 1 in A")


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "num_key_value_heads": 2}
    a = folder(tmp_path / "a", llama_tensors(), config)
    changed = {**config, "rms_norm_eps": 1e-6, "rope_theta": 500000.0}
    b = folder(tmp_path / "b", load_file(a / "model.safetensors"), changed)
    assert [each.sentence for each in compare_weights(a, b).differences] == [
        "The norms' ε is 1e-05 in A and 1e-06 in B.",
        "The base of RoPE (rope_theta) is 10000 in A and 500000 in B.",
    ]
    assert compare_weights(a, a).differences == []


def test_missing_settings_are_listed_as_not_compared(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", llama_tensors(), {"rms_norm_eps": 1e-5})
    b = folder(tmp_path / "b", load_file(a / "model.safetensors"))
    found = compare_weights(a, b)
    assert [(each.where, each.role) for each in found.not_compared] == [("B", "the norms' ε")]
    assert not found.matters


def test_values_rounded_to_bfloat16_and_stored_as_float32_do_not_matter(tmp_path: Path) -> None:
    tensors = llama_tensors()
    a = folder(tmp_path / "a", tensors)
    found = compare_weights(
        a, folder(tmp_path / "b", {name: value.bfloat16().float() for name, value in tensors.items()})
    )
    assert found.differences == []
    assert "rounding" in {each.outcome for each in found.results}


def test_padded_vocabulary_is_a_note(tmp_path: Path) -> None:
    tensors = llama_tensors()
    padded = {
        name: torch.cat([value, torch.zeros(14, 64)]) if value.shape[0] == 50 else value
        for name, value in tensors.items()
    }
    found = compare_weights(folder(tmp_path / "a", tensors), folder(tmp_path / "b", padded))
    assert not found.matters
    assert [each.sentence for each in found.differences] == [
        f"`{name}.weight` has 50 rows in A and 64 in B; the first 50 were compared."
        for name in ("lm_head", "model.embed_tokens")
    ]


def test_quantization_that_is_too_coarse_is_named(tmp_path: Path) -> None:
    model = random_model("llama")
    a = write_folder(model, tmp_path / "a")

    def roughen(tensors: dict[str, Tensor]) -> None:
        value = tensors["blk.1.ffn_up.weight"]
        tensors["blk.1.ffn_up.weight"] = value + 0.3 * value.std() * torch.randn_like(value)

    (difference,) = compare_weights(
        a, write_gguf(model, tmp_path / "m.gguf", "llama", roughen, kind="Q4_0")
    ).differences
    assert difference.kind == "precision"
    assert "differs by more than quantization explains: the relative error is 0.3" in difference.sentence


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"x.weight": torch.randn(4, 4)})
    b = folder(tmp_path / "b", {"y.weight": torch.randn(5, 3)})
    with pytest.raises(InputError, match="have no tensor in common"):
        compare_weights(a, b)
    with pytest.raises(InputError, match="must have parameters"):
        compare_weights(nn.ReLU(), b)
    with pytest.raises(RunError, match="No such file or folder"):
        compare_weights(a, tmp_path / "none")


def test_stack_of_experts_quantized_by_mlx_is_read(tmp_path: Path) -> None:
    """Its scales are as narrow as a convolution's kernel."""
    weight = torch.randn(3, 40, 256)
    parts = [quantize_mlx(each, 4, 64) for each in weight]
    stem = "model.layers.0.mlp.switch_mlp.up_proj"
    quantized = dict(zip((f"{stem}.weight", f"{stem}.scales", f"{stem}.biases"), map(torch.stack, zip(*parts, strict=True)), strict=True))  # fmt: skip
    single = {f"model.layers.0.mlp.experts.{expert}.up_proj.weight": weight[expert] for expert in range(3)}
    found = compare_weights(folder(tmp_path / "a", single), folder(tmp_path / "b", quantized))
    assert (found.differences, [each.outcome for each in found.results]) == ([], ["quantization"] * 3)


def test_float8_rounding_does_not_matter_and_scaled_float8_is_not_compared(tmp_path: Path) -> None:
    tensors = {"layers.0.up_proj.weight": torch.randn(64, 64), "layers.0.down_proj.weight": torch.randn(64, 64)}
    rounded = {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}
    a = folder(tmp_path / "a", tensors)
    found = compare_weights(a, folder(tmp_path / "b", rounded))
    assert (found.differences, {each.outcome for each in found.results}) == ([], {"quantization"})
    scaled = {**rounded, "layers.0.up_proj.weight_scale_inv": torch.ones(1, 1)}
    found = compare_weights(a, folder(tmp_path / "c", scaled))
    assert not found.matters
    assert {(each.where, each.role) for each in found.not_compared} >= {("B", "layers.*.up_proj.weight")}


def test_heads_that_llama_cpp_reorders_are_not_compared(tmp_path: Path) -> None:
    """Columns in another order are not searched for, so the values only seem to differ."""
    tensors = {"blk.0.ssm_out.weight": torch.randn(24, 32), "blk.0.ffn_up.weight": torch.randn(24, 32)}
    sizes = {"n_layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "eps": 1e-6}
    a = write_tensors(tmp_path / "a.gguf", "qwen3next", tensors, sizes)
    changed = {name: value.roll(8, 1) for name, value in tensors.items()}
    found = compare_weights(a, write_tensors(tmp_path / "b.gguf", "qwen3next", changed, sizes))
    assert [each.tensors for each in found.differences] == [("blk.0.ffn_up.weight",)]
    assert ("blk.*.ssm_out.weight", "llama.cpp reorders its heads") in {
        (each.role, each.reason) for each in found.not_compared
    }


def test_matrices_quantized_by_gptq_are_not_compared(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(32, 32),
        "model.layers.0.input_layernorm.weight": torch.randn(32),
    }
    packed = {
        "model.layers.0.self_attn.q_proj.qweight": torch.ones(4, 32, dtype=torch.int32),
        "model.layers.0.input_layernorm.weight": tensors["model.layers.0.input_layernorm.weight"],
    }
    found = compare_weights(folder(tmp_path / "a", tensors), folder(tmp_path / "b", packed))
    assert not found.differences
    assert {(each.where, each.reason) for each in found.not_compared} >= {
        ("A", "no rule matches it with a tensor of the other"), ("B", "it is stored as I32"),
    }  # fmt: skip
