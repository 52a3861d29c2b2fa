"""SmolLM2: its GGUF file against Hugging Face folders written from it, right and with planted errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.converted import plain_names
from safetensors.torch import save_file
from torch import Tensor

from omninorm import Thinker
from omninorm.inspection import compare_weights

pytestmark = pytest.mark.slow
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "num_hidden_layers": 30, "hidden_size": 576,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tensors(smollm2: Path) -> dict[str, Tensor]:
    """The weights in the layout and under the names of transformers, in bfloat16."""
    state = Thinker.from_pretrained(smollm2, dtype=torch.bfloat16).state_dict()
    named = plain_names(state)
    named.pop("lm_head.weight", None)
    return named


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def test_folder_written_from_it_has_no_difference_that_matters(
    smollm2: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    found = compare_weights(smollm2, write(tmp_path, tensors))
    assert (found.differences, found.not_compared) == ([], [])
    assert found.matched() == {"name rules": 272, "rows of A interleaved by head": 60}


def test_errors_in_one_folder_are_all_named(smollm2: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    spoiled = dict(tensors)
    for name, value in tensors.items():
        if "norm" in name and name != "model.norm.weight":
            spoiled[name] = value + 1
    layer = "model.layers.{}."
    first, second = f"{layer.format(3)}mlp.gate_proj.weight", f"{layer.format(3)}mlp.up_proj.weight"
    spoiled[first], spoiled[second] = tensors[second], tensors[first]
    spoiled[f"{layer.format(5)}self_attn.o_proj.weight"] = tensors[f"{layer.format(5)}self_attn.o_proj.weight"].T
    spoiled[f"{layer.format(7)}mlp.down_proj.weight"] = tensors[f"{layer.format(7)}mlp.down_proj.weight"] * 0.5
    del spoiled[f"{layer.format(9)}self_attn.v_proj.weight"]
    found = compare_weights(smollm2, write(tmp_path, spoiled, rms_norm_eps=1e-6))
    sentences = [each.sentence for each in found.differences]
    expected = (
        "The norms' ε is 1e-05 in A and 1e-06 in B.",
        "60 of 61 norms are exactly 1 higher in B: a +1 offset was applied, which this model type does not have; `output_norm.weight` is not.",
        "are swapped in B (1 ×): B has `blk.3.ffn_gate.weight` of A as `blk.3.ffn_up.weight`",
        "`blk.*.attn_output.weight` in 1 of 30 places is transposed in B",
        "`blk.*.ffn_down.weight` in 1 of 30 places is about 0.5 times as large in B",
        "`blk.9.attn_v.weight` is missing from B.",
    )
    assert len(sentences) == len(expected)
    assert all(any(part in sentence for sentence in sentences) for part in expected), sentences
