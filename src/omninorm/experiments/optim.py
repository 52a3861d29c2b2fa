"""AdamW; `param_groups` decides which parameters it decays."""

from __future__ import annotations

import torch
from torch import nn

from omninorm.experiments.settings import TrainConfig
from omninorm.layers import param_groups
from omninorm.placement import keep_normalized


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over `param_groups`. It is fused, because small deep models have many small tensors."""
    groups = param_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.adam_eps, fused=True)
    keep_normalized(model, optimizer)
    return optimizer
