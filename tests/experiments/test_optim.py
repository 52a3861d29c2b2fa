"""The optimizer decays the parameters that `param_groups` selects."""

from __future__ import annotations

import torch
from torch import nn

from omninorm.experiments import TrainConfig, build_optimizer


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
