"""Parameter groups for an optimizer. Mostly the type of a module decides whether its parameters get weight decay."""

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
# Class names of norms and embeddings. `LayerNormLinear` and `BertEmbeddingsPooler` do not match because they are
# neither, `WeightNorm` and `PatchEmbedding` because they are linear maps.
_NORM_CLASS = re.compile(r"(?<!weight)(?<!spectral)norm(\d*d)?(gated)?$", re.IGNORECASE)
_EMBEDDING_CLASS = re.compile(r"(?<!patch)embed(ding)?s?$", re.IGNORECASE)
# Subclasses of these hold matrices, whatever their names are.
_MATRICES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
# Names of a norm's parameters, of those among them that are not gains, and of an embedding's parameters.
_NORM_PARAMETER = re.compile(r"^(.*norm\d*_)?(weight|gain|scale|gamma|g|alpha|bias|shift|beta)$")
_NO_GAIN = re.compile(r"bias|^alpha$|shift$|beta$")
_EMBEDDING_PARAMETER = re.compile(r"^(weights?|emb|w_e|wte|wpe)$", re.IGNORECASE)
# Position tables and trainable tokens that are parameters of larger modules, and the logarithm of Mamba's state matrix.
_TABLES = re.compile(
    r"(^|_)(pos|position|positions|positional)(_|$)|(^|_)(embed|embedding|embeddings|token|tokens|table)$|^A_log$"
)
# Parameters that all examples of a batch share, if their first dimension is 1.
_SHARED = re.compile(
    r"(^|_)(cls|class|mask|emb|embed|embeds|pos|probe|latents?|quer(y|ies)|prompts?)(_|$)|token|embedding"
)
# Names of matrices: of linear maps in any module, and of experts and heads, where the first dimension may be 1.
_MAP = re.compile(r"(^|_)(\w*proj|projection|projections|lora|kernel|linear)(_|$)", re.IGNORECASE)
_STACK = re.compile(
    r"weight|expert|lora|proj|kernel|linear|conv|matri|qkv|(^|_)(fc|up|down|gate|in|out|w|wi|wo|wq|wk|wv)?\d*(_|$)",
    re.IGNORECASE,
)


def decayed_names(model: nn.Module, *, decay_norms: bool = False) -> set[str]:
    """Return the names of the parameters that weight decay applies to: those that none of these rules excludes.

    1. Norms: gains and biases of any shape, in torch.nn's and omninorm's norms and in classes whose names end like a
       norm's (`CohereLayerNorm`, `BatchNorm2d`). Decay would pull a gain towards 0, where the norm's output vanishes.
       `decay_norms=True` lifts the exclusion for gains. Other matrices in a norm (`proj`), and those in a class such
       as `LayerNormLinear`, are decayed.
    2. Vectors and scalars in any module: biases, gains per head, Mamba's D.
    3. Embeddings: parameters of nn.Embedding and nn.EmbeddingBag, and the weights and tables of classes whose names
       end in "Embed", "Embedding", or their plurals (`ViTEmbeddings`: class token and position table). A head that is
       tied to an embedding is excluded with it. Decay shrinks the rows of rare tokens at every step, although only
       their own rare gradients could restore them. A smaller embedding also means larger gradients through the first
       norm, whose Jacobian is inversely proportional to the size of its input (OLMo 2, arXiv 2501.00656). A projection
       that is a parameter of such a class is decayed.
    4. Other parameters that are tables or tokens by name: `pos_embed`, `rel_pos_h`, `relative_position_bias_table`,
       `register_tokens`; and Mamba's `A_log`. If the first dimension is 1, all examples of a batch share the
       parameter; then further names are excluded (`mask`, `latents`), and with three or more dimensions every name
       that is not a matrix's (`weight`, `gate_up_proj`, `w1`).
    5. Parameters that the model's author excluded, whatever `decay_norms` is: those with a true attribute
       `_no_weight_decay` (Mamba's convention), and those that a module's method `no_weight_decay()` names (timm's
       convention).

    The rules on class names do not apply to subclasses of nn.Linear, nn.Bilinear and the convolutions.
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
    """Return whether a parameter of `module` is a norm's gain or bias."""
    if isinstance(module, _NORMS) or _is_named(module, _NORM_CLASS):
        return parameter.ndim < 2 or _NORM_PARAMETER.search(name) is not None
    # A norm fused with a linear layer: only its gain is the norm's, since the linear layer has biases too.
    return parameter.ndim < 2 and "norm" in type(module).__name__.lower() and "norm" in name


def _is_of_embedding(module: nn.Module, name: str) -> bool:
    """Return whether a parameter of `module` holds embeddings; `_is_table` covers other tables and tokens."""
    if isinstance(module, _EMBEDDINGS):
        return True
    return _is_named(module, _EMBEDDING_CLASS) and _EMBEDDING_PARAMETER.search(name) is not None


def _is_named(module: nn.Module, pattern: re.Pattern[str]) -> bool:
    """Return whether the class's name matches `pattern` and the class is not known to hold matrices."""
    return pattern.search(type(module).__name__) is not None and not isinstance(module, _MATRICES)


def _is_table(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Return whether rule 4 holds for a parameter of `module`."""
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
    """Return whether `method` can be called without arguments, as timm's convention requires."""
    if isinstance(method, (nn.Module, type)):
        return False
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):
        return False
    return True


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's own parameters by name, and the originals of those that torch.nn.utils.parametrize computes."""
    yield from module.named_parameters(recurse=False)
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict):
        for name, parametrization in parametrizations.items():
            yield from ((name, parameter) for parameter in parametrization.parameters())


def param_groups(model: nn.Module, weight_decay: float, *, decay_norms: bool = False) -> list[dict[str, Any]]:
    """Return two groups for an optimizer: the parameters that weight decay applies to, and the rest.

    The matrices of linear layers, convolutions and experts are decayed. Norms, vectors, embeddings, tables of
    positions, tokens, Mamba's A_log and D, and parameters excluded by `_no_weight_decay` or `no_weight_decay()` are
    not. `omninorm.layers.groups.decayed_names` lists the rules.

    Args:
        model: any model, including one wrapped in FSDP2 or DistributedDataParallel.
        weight_decay: the weight decay of the first group, ≥ 0; the second group's is 0.
        decay_norms: whether the gains of norms are decayed too. Use it for zero-centered gains (γ + 1, as with
            `gain_offset=1`): decay pulls γ + 1 towards 1, but a plain gain towards 0.

    Returns:
        [decayed, excluded], each with "params" and "weight_decay"; a group without parameters is left out. Each
        trainable parameter is in exactly one of them, in the order of `named_parameters`.

    Raises:
        ConfigError: weight_decay is not a finite number ≥ 0, or decay_norms is not a bool.

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
