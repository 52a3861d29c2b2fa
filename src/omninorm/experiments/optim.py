"""AdamW, with weight decay decided by the type of the module that owns a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from omninorm.experiments.settings import TrainConfig
from omninorm.layers import NORM_TYPES


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: matrices, that is, all that is not one of these.

    - Gains and biases of norms, whatever their shape: decay would pull a gain towards 0, where a norm is silent.
    - Vectors and scalars anywhere: biases, gains per head.
    - Embeddings, a tied head included: decay shrinks the rows of rare tokens at every step although only their own
      rare gradients could restore them, and a smaller embedding means larger gradients through the first norm,
      whose Jacobian is inversely proportional to its input's size (OLMo 2, arXiv 2501.00656).
    """
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (*NORM_TYPES, nn.Embedding))
        for parameter in module.parameters(recurse=False)
    }
    named = model.named_parameters()
    return {name for name, parameter in named if parameter.ndim >= 2 and id(parameter) not in spared}


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: decayed, then not decayed. Every trainable parameter is in exactly one."""
    decayed = decayed_names(model)
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `param_groups`; one fused kernel per step, since small deep models have many small tensors."""
    groups = [group for group in param_groups(model, config.weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.adam_eps, fused=True)
