"""Which parameters weight decay applies to, for every kind of norm."""

from __future__ import annotations

import pytest
import transformers as hf
from torch import nn

from omninorm.config import NORMALIZATIONS, PLACEMENTS, NormConfig
from omninorm.errors import ConfigError
from omninorm.layers import LayerNorm, param_groups
from omninorm.layers.groups import decayed_names
from omninorm.thinker import Thinker, ThinkerConfig


def _named(model: nn.Module, group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def _thinker(**settings) -> Thinker:
    return Thinker(ThinkerConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=8, **settings))


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_the_linear_layers_matrices_decay(kind, placement):
    model = _thinker(norm=NormConfig(kind, placement), tied_head=False)
    decayed, spared = param_groups(model, 0.1)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 4 + 3 + 1
    assert _named(model, decayed) == linear
    assert _named(model, decayed) | _named(model, spared) == {name for name, _ in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert "embedding.weight" in _named(model, spared)


def test_a_tied_head_is_an_embedding():
    model = _thinker(tied_head=True)
    assert "embedding.weight" in _named(model, param_groups(model, 0.1)[1])


def test_the_module_type_decides_not_the_shape_or_the_name():
    model = nn.ModuleDict({"norm": nn.Linear(3, 4), "linear": nn.LayerNorm((3, 4)), "conv": nn.Conv1d(2, 2, 3)})
    decayed, spared = param_groups(model, 0.1)
    assert _named(model, decayed) == {"norm.weight", "conv.weight"}
    assert _named(model, spared) == {"norm.bias", "linear.weight", "linear.bias", "conv.bias"}


def test_frozen_parameters_are_left_out():
    model = _thinker()
    model.embedding.weight.requires_grad_(False)
    grouped = [parameter for group in param_groups(model, 0.1) for parameter in group["params"]]
    assert all(parameter is not model.embedding.weight for parameter in grouped)


@pytest.mark.parametrize("name", ["GPT2", "Qwen3", "Gemma2"])
def test_norms_that_others_wrote_are_spared(name: str) -> None:
    """Lists of names miss GPT-2's ln_f and Qwen3's q_norm."""
    settings = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    model = getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**settings))
    decayed, spared = param_groups(model, 0.1)
    norms = {
        id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters(recurse=False)
    }
    assert norms
    assert norms <= {id(parameter) for parameter in spared["params"]}
    assert all(parameter.ndim == 2 for parameter in decayed["params"])


def test_a_group_without_parameters_is_left_out():
    assert [group["weight_decay"] for group in param_groups(nn.LayerNorm(3), 0.1)] == [0.0]
    assert param_groups(nn.Identity(), 0.1) == []


@pytest.mark.parametrize("decay", [-0.1, float("nan"), "0.1", None])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ConfigError, match="weight_decay must be a finite number ≥ 0"):
        param_groups(nn.Linear(2, 2), decay)


def test_what_a_gain_is_computed_from_is_spared_too():
    norm = LayerNorm((2, 4))
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    assert decayed_names(nn.Sequential(nn.Linear(8, 8), norm)) == {"0.weight"}
