"""Experts, routers and gated, grouped and latent norms of transformers' model types are folded exactly."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import zoo
from torch import Tensor, nn

from omninorm.surgery import center, fold_gains, swap_norms, verify

_HEADS = r"\.(q|k|query|key)_(layer)?norm$"  # followed by a rotation
_NONE = r"(?!)"
# Model type → the norms in which something else than a linear layer consumes the output; all others are folded.
UNFOLDABLE = {
    "apertus": _HEADS,
    "aria_text": _NONE,
    "bamba": _NONE,
    "bitnet": _NONE,
    "dbrx": _NONE,
    "deepseek_v2": _NONE,
    "deepseek_v3": _NONE,
    "dots1": _HEADS,
    "ernie4_5_moe": _NONE,
    "falcon_h1": _NONE,
    "falcon_mamba": _NONE,
    "glm4_moe": _NONE,
    "gpt_oss": _NONE,
    "granitemoe": _NONE,
    "granitemoehybrid": _NONE,
    "granitemoeshared": _NONE,
    "hunyuan_v1_moe": _HEADS,
    "jamba": r"\.(b|c)_layernorm$",  # Mamba's B and C, which multiply its state
    "jetmoe": _NONE,
    "lfm2_moe": _HEADS,
    "llama4_text": _NONE,
    "mamba": _NONE,
    "mamba2": _NONE,
    "minicpm3": _NONE,
    "minimax_m2": _HEADS,
    "mixtral": _NONE,
    "nemotron": _NONE,
    "nemotron_h": _NONE,
    "olmoe": _HEADS,
    "phimoe": r"post_attention_layernorm$",  # its β: neither the router nor the experts have a bias
    "qwen2_moe": _NONE,
    "qwen3_5_moe_text": _HEADS,
    "qwen3_5_text": _HEADS,
    "qwen3_moe": _HEADS,
    "qwen3_next": _HEADS,
    "recurrent_gemma": _NONE,
}
QUICK = ("deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_next")
TYPES = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in UNFOLDABLE]


def norms(model: nn.Module) -> set[str]:
    """The norms that have a gain, by the names of their classes."""
    return {
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    }


def logits(model: nn.Module) -> Tensor:
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(zoo.TOKENS).logits.double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", TYPES)
def test_every_norm_before_linear_layers_is_folded_and_undone(kind: str) -> None:
    model = zoo.build(kind)
    before, expected = {name: value.clone() for name, value in model.state_dict().items()}, logits(model)
    original = copy.deepcopy(model)
    report = fold_gains(model)
    assert set(report.changed) | set(report.refused) == norms(model)
    assert set(report.refused) == {name for name in norms(model) if re.search(UNFOLDABLE[kind], name)}
    assert report.error <= 1e-12
    assert report.proof.experts[0] == report.proof.experts[1]
    assert report.proof.coverage == 1
    # Without the proof's float64, routers and norms round to float32 inside.
    assert float((logits(model) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    for name in report.changed:
        weight = model.get_submodule(name).weight
        assert torch.all((weight == 1) | (weight == 0))
    if kind in QUICK:
        assert verify(original, model).relative <= 1e-12
    report.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "norm", "what", "is_swapped"),
    [
        ("nemotron_h", "model.layers.0.mixer.norm", "gated RMSNorm over groups", True),
        ("nemotron", "model.layers.0.input_layernorm", "LayerNorm1P", False),
        ("qwen3_next", "model.layers.0.linear_attn.norm", "gated RMSNorm", True),
    ],
)
def test_norms_of_other_kinds_are_named_as_what_they_are(kind: str, norm: str, what: str, is_swapped: bool) -> None:
    model = zoo.build(kind)
    changed = fold_gains(model).changed
    assert norm in changed, sorted(changed)
    assert changed[norm].endswith(f"({what})")
    report = swap_norms(model)
    assert (norm in report.changed, norm in report.refused) == (is_swapped, not is_swapped)


def test_router_and_experts_in_one_tensor_are_named_as_consumers() -> None:
    changed = fold_gains(zoo.build("mixtral", num_hidden_layers=1)).changed
    layer = "model.layers.0"
    assert set(changed[f"{layer}.post_attention_layernorm"].removeprefix("into ").split(", ")) == {
        f"{layer}.mlp.gate",
        f"{layer}.mlp.experts.gate_up_proj",
    }


@pytest.mark.parametrize("kind", ["nemotron", pytest.param("phimoe", marks=pytest.mark.slow)])
def test_layer_norms_with_an_offset_or_before_experts_are_centered(kind: str) -> None:
    model = zoo.build(kind)
    original = copy.deepcopy(model)
    report = center(model)
    became = [name for name, what in report.changed.items() if "RMSNorm" in what]
    assert len(became) >= 3
    assert set(became) | set(report.refused) == norms(original)
    assert all("has no bias to take it" in why for why in report.refused.values())
    assert report.error <= 1e-12
    assert verify(original, model).relative <= 1e-12
