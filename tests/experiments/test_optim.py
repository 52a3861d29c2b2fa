"""Which parameters weight decay applies to, for every kind of norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omninorm.config import NORMALIZATIONS, PLACEMENTS, NormConfig
from omninorm.experiments import TrainConfig, build_optimizer, param_groups
from omninorm.thinker import Thinker, ThinkerConfig

MATRICES = {"attention.q", "attention.k", "attention.v", "attention.out"}


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


def test_decay_shrinks_a_matrix_and_leaves_a_gain():
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    optimizer = build_optimizer(model, TrainConfig(lr=0.5, weight_decay=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weight, bias, gain = (parameter.detach() for parameter in model.parameters())
    # AdamW with a zero gradient: w ← (1 − lr·λ)·w, here 0.95·w, rounded once.
    torch.testing.assert_close(weight, before[0] * 0.95, rtol=2**-23, atol=0)
    assert torch.equal(bias, before[1])
    assert torch.equal(gain, before[2])
