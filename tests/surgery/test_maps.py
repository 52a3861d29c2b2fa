"""norm_map finds readers and writers of norms by the flow of data, also where llm-compressor's maps are written by hand."""

from __future__ import annotations

import json

import pytest
from helpers import surgery_models as subjects
from helpers import zoo
from torch import Tensor, nn

from omninorm.surgery import norm_map

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FED = ("mlp.gate_proj", "mlp.up_proj")
DEFAULT = {"input_layernorm": QKV, "post_attention_layernorm": FED}
PAIRS = {"self_attn.v_proj": ("self_attn.o_proj",), "mlp.up_proj": ("mlp.down_proj",)}
# Model type → norm of a block → the layers that llm-compressor balances for it (in 5.23 of transformers, experts are one
# tensor), and its pairs of linear layers.
THEIRS: dict[str, tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]] = {
    "llama": (DEFAULT, PAIRS),
    "mistral": (DEFAULT, PAIRS),
    "qwen2": (DEFAULT, PAIRS),
    "qwen3": (DEFAULT, PAIRS),
    "gemma2": ({"input_layernorm": QKV, "pre_feedforward_layernorm": FED}, PAIRS),
    "gemma3_text": ({"input_layernorm": QKV, "pre_feedforward_layernorm": FED}, PAIRS),
    "cohere": ({"input_layernorm": (*QKV, *FED)}, PAIRS),
    "exaone4": ({}, PAIRS),
    "olmo3": ({}, PAIRS),
    "bloom": (
        {
            "input_layernorm": ("self_attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        },
        {},
    ),
}
# The same, where norm_map differs: routers read norms, too, and DeepSeek's and Phi's fused matrices are no pairs.
OURS: dict[str, tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]] = {
    "mixtral": (
        {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate", "mlp.experts.gate_up_proj")},
        {"self_attn.v_proj": ("self_attn.o_proj",)},
    ),
    "qwen3_moe": (
        {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate", "mlp.experts.gate_up_proj")},
        {"self_attn.v_proj": ("self_attn.o_proj",)},
    ),
    "phi3": (
        {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
        {},
    ),
    "deepseek_v3": (
        {
            "input_layernorm": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
            "self_attn.q_a_layernorm": ("self_attn.q_b_proj",),
            "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
            "post_attention_layernorm": (
                "mlp.gate",
                "mlp.experts.gate_up_proj",
                "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj",
            ),
        },
        {"mlp.shared_experts.up_proj": ("mlp.shared_experts.down_proj",)},
    ),
}
OURS["deepseek_v2"] = OURS["deepseek_v3"]


def build(name: str) -> nn.Module:
    return subjects.build(name) if name in subjects.MODELS else zoo.build(name)


@pytest.mark.parametrize("name", [*THEIRS, *OURS])
def test_mappings_of_the_last_block_are_those_of_llm_compressor_or_the_documented_others(name: str) -> None:
    model = build(name)
    norms, pairs = (THEIRS | OURS)[name]
    prefix = "transformer.h.1." if name == "bloom" else "model.layers.1."
    found = norm_map(model)
    expected = [[[f"{prefix}{each}" for each in readers], f"{prefix}{norm}"] for norm, readers in norms.items()]
    smooth = [each for each in found.smoothquant() if each[1].startswith(prefix)]
    assert sorted(smooth, key=str) == sorted(expected, key=str)
    awq = {each["smooth_layer"]: each["balance_layers"] for each in found.awq()}
    block = {name: readers for name, readers in awq.items() if name.startswith(prefix)}
    assert block == {
        f"{prefix}{each}": [f"{prefix}{one}" for one in readers] for each, readers in (norms | pairs).items()
    }
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    assert all(each in names for readers, norm in found.smoothquant() for each in (*readers, norm))


def test_writers_are_those_before_the_norm() -> None:
    found = {norm.name: norm for norm in norm_map(build("gemma2")).norms}
    layer = "model.layers.0"
    assert found[f"{layer}.input_layernorm"].writers == ("model.embed_tokens",)
    assert found[f"{layer}.post_attention_layernorm"].writers == (f"{layer}.self_attn.o_proj",)
    assert found[f"{layer}.pre_feedforward_layernorm"].writers == (
        "model.embed_tokens",
        f"{layer}.post_attention_layernorm",
    )
    assert found[f"{layer}.post_attention_layernorm"].others == f"aten.add.Tensor in {layer}"
    assert found["model.norm"].readers == ("lm_head",)
    assert all(norm.complete and norm.kind == "RMSNorm" for norm in found.values())


def test_experts_position_tables_and_convolutions_are_writers() -> None:
    mixtral = norm_map(build("mixtral")).norms[-1]
    assert {f"model.layers.{block}.mlp.experts.down_proj" for block in (0, 1)} < set(mixtral.writers)
    vit = norm_map(build("vit"), subjects.inputs("vit")).norms[0]
    assert set(vit.writers) == {
        "vit.embeddings.patch_embeddings.projection",
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
    }


def test_input_that_something_else_computes_is_not_complete() -> None:
    """Whisper's stream begins after a GELU."""
    (first, *_) = norm_map(build("whisper encoder"), subjects.inputs("whisper encoder")).norms
    assert first.writers == ("embed_positions",)
    assert not first.complete


def test_norm_that_is_also_added_to_the_stream_is_not_smoothed() -> None:
    """BERT's, which are on the stream: scaling their outputs would change what is added."""
    found = norm_map(build("bert"))
    added = [norm.name for norm in found.norms if norm.readers and norm.others]
    assert "bert.encoder.layer.1.attention.output.LayerNorm" in added
    assert not set(added) & {name for _, name in found.smoothquant()}
    assert not set(added) & {each["smooth_layer"] for each in found.awq()}


class Sub(nn.Module):
    """A norm after an activation, read by two layers, one of which is also multiplied by the other's output."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 8), nn.RMSNorm(8)
        self.one, self.other, self.last = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.table(tokens).tanh())
        return self.last(self.one(h).sigmoid() * self.other(h))


def test_map_is_plain_data_and_leaves_the_model_unchanged() -> None:
    model = Sub()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = json.loads(json.dumps(norm_map(model).as_dict()))
    assert found == {
        "norms": [
            {
                "name": "norm",
                "kind": "RMSNorm",
                "readers": ["one", "other"],
                "others": "",
                "writers": [],
                "complete": False,
            }
        ],
        "pairs": {"other": ["last"]},
    }
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
