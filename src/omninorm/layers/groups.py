"""Parameter groups for an optimizer: what weight decay applies to, by the type of the module that owns a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from omninorm.config import check_number
from omninorm.layers.build import NORM_TYPES

_SPARED = (
    *NORM_TYPES,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.Embedding,
    nn.EmbeddingBag,
)


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: matrices, that is, all that is not one of these.

    - Gains and biases of norms, whatever their shape: decay would pull a gain towards 0, where a norm is silent.
    - Vectors and scalars anywhere: biases, gains per head, the gains of norms that others wrote. No name is looked at:
      those of norms are missed by lists of names ("ln_f", "q_norm", "0").
    - Embeddings, a tied head included: decay shrinks the rows of rare tokens at every step although only their own
      rare gradients could restore them, and a smaller embedding means larger gradients through the first norm,
      whose Jacobian is inversely proportional to its input's size (OLMo 2, arXiv 2501.00656).
    """
    spared = {id(parameter) for module in model.modules() if isinstance(module, _SPARED) for parameter in _own(module)}
    named = model.named_parameters()
    return {name for name, parameter in named if parameter.ndim >= 2 and id(parameter) not in spared}


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's parameters, also those from which torch.nn.utils.parametrize computes them."""
    yield from module.parameters(recurse=False)
    if isinstance(behind := module._modules.get("parametrizations"), nn.ModuleDict):
        yield from behind.parameters()


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what weight decay applies to (see `decayed_names`), and the rest.

    Args:
        model: any model, also one inside of FSDP2 or DistributedDataParallel.
        weight_decay: of the first group, ≥ 0; the second's is 0.

    Returns:
        [decayed, spared], each with "params" and "weight_decay"; a group without parameters is left out. Every
        trainable parameter is in exactly one, once, in the order of `named_parameters`.

    Raises:
        ConfigError: weight_decay is no finite number ≥ 0.

    Example:
        >>> groups = param_groups(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)), weight_decay=0.1)
        >>> [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
        [(0.1, [(4, 4)]), (0.0, [(4,), (4,)])]
    """
    check_number("weight_decay", weight_decay, at_least=0.0)
    decayed = decayed_names(model)
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed].append(parameter)
    both = [
        {"params": groups[True], "weight_decay": float(weight_decay)},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]
