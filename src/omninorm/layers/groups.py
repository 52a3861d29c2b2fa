"""Parameter groups for an optimizer: which parameters weight decay applies to, mostly by the type of their module."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from omninorm.config import read_number
from omninorm.errors import ConfigError
from omninorm.layers.build import NORM_TYPES

_NORMS = (*NORM_TYPES, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Classes that are norms or embeddings by name. `LayerNormLinear` and `BertEmbeddingsPooler` are neither; `WeightNorm`
# and `PatchEmbedding` are linear maps.
_NORM_CLASS = re.compile(r"(?<!weight)(?<!spectral)norm(\d*d)?(gated)?$", re.IGNORECASE)
_EMBEDDING_CLASS = re.compile(r"(?<!patch)embed(ding)?s?$", re.IGNORECASE)
# A subclass of these holds matrices, whatever its name.
_MATRICES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
# The parameters of a norm and of an embedding by name, and those of a norm that are no gains.
_NORM_PARAMETER = re.compile(r"^(.*norm\d*_)?(weight|gain|scale|gamma|g|alpha|bias|shift|beta)$")
_NO_GAIN = re.compile(r"bias|^alpha$|shift$|beta$")
_EMBEDDING_PARAMETER = re.compile(r"^(weights?|emb|w_e|wte|wpe)$", re.IGNORECASE)
# Position tables, tokens and the like that are no module of their own, and Mamba's state matrix, stored as logarithm.
_TABLES = re.compile(
    r"(^|_)(pos|position|positions|positional)(_|$)|(^|_)(embed|embedding|embeddings|token|tokens|table)$|^A_log$"
)
# What all examples of a batch share, if the first dimension is 1.
_SHARED = re.compile(
    r"(^|_)(cls|class|mask|emb|embed|embeds|pos|probe|latents?|quer(y|ies)|prompts?)(_|$)|token|embedding"
)
# Names of matrices: linear maps anywhere, and those of experts and heads, whose first dimension may be 1.
_MAP = re.compile(r"(^|_)(\w*proj|projection|projections|lora|kernel|linear)(_|$)", re.IGNORECASE)
_STACK = re.compile(
    r"weight|expert|lora|proj|kernel|linear|conv|matri|qkv|(^|_)(fc|up|down|gate|in|out|w|wi|wo|wq|wk|wv)?\d*(_|$)",
    re.IGNORECASE,
)


def decayed_names(model: nn.Module, *, decay_norms: bool = False) -> set[str]:
    """Return the names of the parameters that weight decay applies to: all that none of these rules excludes.

    1. Norms: gains and biases of any shape, in modules of torch.nn's and omninorm's norm types and in classes whose
       names end like a norm's (`CohereLayerNorm`, `BatchNorm2d`). Decay would pull a gain towards 0, where a norm's
       output vanishes. With `decay_norms`, their gains are decayed all the same. Other matrices of a norm (`proj`), and
       those of a class such as `LayerNormLinear`, are decayed.
    2. Vectors and scalars anywhere: biases, gains per head, Mamba's D.
    3. Embeddings: parameters of nn.Embedding and nn.EmbeddingBag, and the weights and tables of classes whose names
       end in "Embed", "Embedding", or their plurals (`ViTEmbeddings`: class token and position table), a tied head
       included. Decay shrinks the rows of rare tokens at every step although only their own rare gradients could
       restore them, and a smaller embedding means larger gradients through the first norm, whose Jacobian is inversely
       proportional to its input's size (OLMo 2, arXiv 2501.00656). A loose projection in such a class is decayed.
    4. Other parameters with a name for a table or token: `pos_embed`, `rel_pos_h`, `relative_position_bias_table`,
       `register_tokens`; and Mamba's `A_log`. Of those with a first dimension of 1, which all examples of a batch
       share, also other names (`mask`, `latents`), and with three or more dimensions all names but those of matrices
       (`weight`, `gate_up_proj`, `w1`).
    5. What its author excluded, with `decay_norms` too: parameters with a true attribute `_no_weight_decay` (Mamba's
       convention), or named by the method `no_weight_decay()` of a module (timm's convention).

    Subclasses of nn.Linear, nn.Bilinear and the convolutions are exempt from the rules on class names.
    """
    excluded: set[int] = set()
    gains: set[int] = set()
    by_author: set[int] = set()
    for module in model.modules():
        for name, parameter in _own(module):
            if _is_of_norm(module, name, parameter):
                excluded.add(id(parameter))
                if not _NO_GAIN.search(name):
                    gains.add(id(parameter))
            elif _is_of_embedding(module, name) or _is_table(module, name, parameter):
                excluded.add(id(parameter))
        by_author |= {id(parameter) for parameter in _excluded_by_author(module)}
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in by_author
        and ((decay_norms and id(parameter) in gains) or (parameter.ndim >= 2 and id(parameter) not in excluded))
    }


def _is_of_norm(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter of `module` is a norm's gain or bias."""
    if isinstance(module, _NORMS) or _is_named(module, _NORM_CLASS):
        return parameter.ndim < 2 or _NORM_PARAMETER.search(name) is not None
    # The gain of a norm that is fused with a linear layer, which has biases of its own.
    return parameter.ndim < 2 and "norm" in type(module).__name__.lower() and "norm" in name


def _is_of_embedding(module: nn.Module, name: str) -> bool:
    """Whether a parameter of `module` holds embeddings; `_is_table` knows further names."""
    if isinstance(module, _EMBEDDINGS):
        return True
    return _is_named(module, _EMBEDDING_CLASS) and _EMBEDDING_PARAMETER.search(name) is not None


def _is_named(module: nn.Module, pattern: re.Pattern[str]) -> bool:
    """Whether the class's name matches; parametrized modules have classes that PyTorch derives and names."""
    return pattern.search(type(module).__name__) is not None and not isinstance(module, _MATRICES)


def _is_table(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether rule 4 holds for a parameter of `module`."""
    if name == "weight" or isinstance(module, _MATRICES) or _is_parametrization(module) or _MAP.search(name):
        return False
    if _TABLES.search(name):
        return True
    if parameter.ndim < 2 or parameter.shape[0] != 1:
        return False
    return _SHARED.search(name) is not None or (parameter.ndim >= 3 and not _STACK.search(name))


def _is_parametrization(module: nn.Module) -> bool:
    return isinstance(module, nn.utils.parametrize.ParametrizationList)


def _excluded_by_author(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from (parameter for _, parameter in _own(module) if getattr(parameter, "_no_weight_decay", False))
    named = getattr(module, "no_weight_decay", None)
    if callable(named) and _takes_no_arguments(named):
        parameters = dict(module.named_parameters())
        names = named()
        if isinstance(names, (set, frozenset, list, tuple, dict)):
            yield from (parameters[name] for name in names if name in parameters)


def _takes_no_arguments(method: Callable[..., object]) -> bool:
    """Whether `method` can be called without arguments, as timm's convention wants it."""
    if isinstance(method, (nn.Module, type)):
        return False
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):
        return False
    return True


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
