"""Parameter groups for an optimizer: which parameters weight decay applies to, mostly by the type of their module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from omninorm.config import read_number
from omninorm.errors import ConfigError
from omninorm.layers.build import NORM_TYPES

_NORMS = (*NORM_TYPES, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# A subclass of these holds matrices, whatever its name.
_MATRICES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
# Position tables, tokens and the like that are no module of their own, and Mamba's state matrix, stored as logarithm.
_TABLES = re.compile(
    r"(^|_)(pos|position|positions|positional)(_|$)|(^|_)(embed|embedding|embeddings|token|tokens|table)$|^A_log$"
)
# Parameters of norms that are no gains, for `decay_norms`.
_NO_GAINS = re.compile(r"bias|^alpha$|^shift$|^beta$")


def decayed_names(model: nn.Module, *, decay_norms: bool = False) -> set[str]:
    """Return the names of the parameters that weight decay applies to: all that none of these rules excludes.

    1. Norms: gains and biases of any shape, in modules of torch.nn's and omninorm's norm types and in classes that have
       "norm" in their name (`CohereLayerNorm`). Decay would pull a gain towards 0, where a norm's output vanishes.
       With `decay_norms` their gains are decayed all the same.
    2. Vectors and scalars anywhere: biases, gains per head, Mamba's D.
    3. Embeddings: parameters of nn.Embedding, nn.EmbeddingBag and of classes that have "embed" in their name
       (`ViTEmbeddings`: class token and position table), a tied head included. Decay shrinks the rows of rare tokens at
       every step although only their own rare gradients could restore them, and a smaller embedding means larger
       gradients through the first norm, whose Jacobian is inversely proportional to its input's size (OLMo 2,
       arXiv 2501.00656).
    4. Other parameters that aren't called `weight` and either have a first dimension of 1, so that all examples of a
       batch share them, or a name for a table or token: `pos_embed`, `rel_pos_h`, `relative_position_bias_table`,
       `cls_token`, `register_tokens`; and Mamba's `A_log`.
    5. What its author excluded: parameters with a true attribute `_no_weight_decay` (Mamba's convention), or named by
       the method `no_weight_decay()` of a module (timm's convention).

    Subclasses of nn.Linear, nn.Bilinear and the convolutions are exempt from the rules on class names.
    """
    excluded: set[int] = set()
    gains: set[int] = set()
    for module in model.modules():
        own = list(_own(module))
        if _is_norm(module):
            gains |= {id(parameter) for name, parameter in own if not _NO_GAINS.search(name)}
        if _is_norm(module) or _is_embedding(module):
            excluded |= {id(parameter) for _, parameter in own}
        excluded |= {id(parameter) for name, parameter in own if _is_table(module, name, parameter)}
        excluded |= {id(parameter) for parameter in _excluded_by_author(module)}
    return {
        name
        for name, parameter in model.named_parameters()
        if (decay_norms and id(parameter) in gains) or (parameter.ndim >= 2 and id(parameter) not in excluded)
    }


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or _is_named(module, "norm")


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, _EMBEDDINGS) or _is_named(module, "embed")


def _is_named(module: nn.Module, part: str) -> bool:
    """Whether the class's name contains `part`; parametrized modules have classes that PyTorch derives and names."""
    return part in type(module).__name__.lower() and not isinstance(module, _MATRICES)


def _is_table(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether rule 4 holds for a parameter of `module`."""
    if name == "weight" or isinstance(module, _MATRICES) or _is_parametrization(module):
        return False
    return (parameter.ndim >= 2 and parameter.shape[0] == 1) or _TABLES.search(name) is not None


def _is_parametrization(module: nn.Module) -> bool:
    return isinstance(module, nn.utils.parametrize.ParametrizationList)


def _excluded_by_author(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from (parameter for _, parameter in _own(module) if getattr(parameter, "_no_weight_decay", False))
    named = getattr(module, "no_weight_decay", None)
    if callable(named):
        parameters = dict(module.named_parameters())
        names = named()
        if isinstance(names, (set, frozenset, list, tuple, dict)):
            yield from (parameters[name] for name in names if name in parameters)


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's parameters by name, also those from which torch.nn.utils.parametrize computes them."""
    yield from module.named_parameters(recurse=False)
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict):
        for name, parametrization in parametrizations.items():
            yield from ((name, parameter) for parameter in parametrization.parameters())


def param_groups(model: nn.Module, weight_decay: float, *, decay_norms: bool = False) -> list[dict[str, Any]]:
    """Return two groups for an optimizer: the parameters that weight decay applies to, and the rest.

    Decayed are the matrices of linear layers, convolutions and experts. Excluded are norms, vectors, embeddings, tables
    of positions, tokens, Mamba's A_log and D, and what `_no_weight_decay` or `no_weight_decay()` names; the rules are
    listed at `omninorm.layers.groups.decayed_names`.

    Args:
        model: any model, also one inside of FSDP2 or DistributedDataParallel.
        weight_decay: for the first group, ≥ 0; the second's is 0.
        decay_norms: whether the gains of norms are decayed too. Meant for zero-centred gains (γ + 1, as
            `gain_offset=1` makes them), which decay pulls towards 1; a plain gain is pulled towards 0.

    Returns:
        [decayed, excluded], each with "params" and "weight_decay"; a group without parameters is left out. Every
        trainable parameter is in exactly one, once, in the order of `named_parameters`.

    Raises:
        ConfigError: weight_decay is not a finite number ≥ 0, or decay_norms not a bool.

    Example:
        >>> groups = param_groups(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)), weight_decay=0.1)
        >>> [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
        [(0.1, [(4, 4)]), (0.0, [(4,), (4,)])]
    """
    weight_decay = read_number("weight_decay", weight_decay, at_least=0.0)
    if not isinstance(decay_norms, bool):
        raise ConfigError("decay_norms must be True or False", repr(decay_norms), "pass one of them")
    decayed = decayed_names(model, decay_norms=decay_norms)
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed].append(parameter)
    both = [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]
