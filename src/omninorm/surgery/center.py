"""Converts LayerNorm to RMSNorm exactly, by removing the mean from everything that writes to the residual stream.

If every summand of the stream has mean zero, so has the stream, and LayerNorm of it equals RMSNorm of it. A linear
layer that writes W x + b to the stream is centered by subtracting the mean over its outputs from W and from b, an
embedding by subtracting each row's mean (Jiang et al. 2023, arXiv 2305.14858).

Writers to the residual stream are identified by probing: a weight writes only to the stream exactly if centering it
changes no output, because every LayerNorm that consumes the stream subtracts the mean anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from omninorm.layers import RMSNorm
from omninorm.layers.identify import Identity, identify
from omninorm.surgery.flow import mean_shares
from omninorm.surgery.fold import (
    MORE_INPUTS,
    Plans,
    fold,
    plan_folds,
    probe,
    settle_folds,
    undone_by_errors,
    untie,
    untie_head,
)
from omninorm.surgery.linear import read_linear
from omninorm.surgery.proof import could_consume
from omninorm.surgery.report import Surgery
from omninorm.surgery.settle import Probed, settle
from omninorm.surgery.streamed_map import StreamedMap
from omninorm.surgery.verify import EXACT

# Largest mean² over mean square of a norm's input that counts as centered; rounding leaves about 1e-30.
_NO_MEAN = 1e-20


def center(
    model: nn.Module, inputs: Sequence[Any] | None = None, *, new_biases: bool = True, replace: bool = True
) -> Surgery:
    """Convert the LayerNorms of a pre-norm model to RMSNorms, in place, with the same outputs.

    First β is folded into the linear layers after each LayerNorm (see `fold_gains`), since RMSNorm has none. Then the
    writers to the residual stream are centered. Then each LayerNorm whose input has mean zero becomes an RMSNorm with
    the same ε. A LayerNorm whose bias cannot be folded, or whose input keeps a mean (after a post-norm's bias, for
    instance), is kept and refused with the reason; the outputs are the same either way.

    Args:
        model, inputs, new_biases: as in `fold_gains`.
        replace: False keeps the LayerNorms, which then compute the same as RMSNorms, for classes that have them.

    Returns, raises: as `fold_gains`.
    """
    before = probe(model, inputs)
    done = Surgery(operation="centered", device=before.device)
    with undone_by_errors(done):
        untie_head(model, done)
        center_all(before, model, done, new_biases, replace)
        done.finish()
    return done


def center_all(before: Probed, model: nn.Module | None, done: Surgery, new_biases: bool, replace: bool) -> None:
    """Center a float64 copy, and the original model, if any."""
    made = before.model
    identities = _layer_norms(made)
    norms = {name: made.get_submodule(name) for name in identities}
    if not norms:
        done.undo()
        return
    done.proof = before.proof
    if beyond := _unreached(before, identities):
        done.undo()
        done.refused = dict.fromkeys(norms, beyond)
        return
    plans = plan_folds(before, done.refused, new_biases)
    done.refused = {name: why for name, why in done.refused.items() if name in norms}
    _fold_biases(before, model, norms, plans, done)
    _center_writers(before, model, {identity.width or 0 for identity in identities.values()}, done)
    shares = mean_shares(made, list(norms), before.runs)
    replaced = Surgery()
    for name in norms:
        if name in done.refused:
            continue
        if shares[name] > _NO_MEAN:
            done.refused[name] = f"its input keeps a mean (mean² is up to {shares[name]:.1e} of its mean square)"
            continue
        _replace(made, name, identities[name], replaced)
        if replace and model is not None:
            _replace(model, name, identities[name], done)
        done.changed[name] = "LayerNorm → RMSNorm" if replace else "LayerNorm that equals RMSNorm"
    done.error = before.distance()
    done.proof = before.proof
    if not replace:
        replaced.undo()
    if not done.error <= EXACT:
        done.refused = dict.fromkeys(norms, f"the outputs would change by {done.error:.1e}")
    if len(done.refused) == len(norms):  # for nothing
        done.undo()
        done.changed.clear()


def _layer_norms(model: nn.Module) -> dict[str, Identity]:
    """Return the LayerNorms of a copy: omninorm's, and those whose gain is one plus a parameter."""
    found = {}
    for name, module in model.named_modules():
        identity = identify(module) if isinstance(module, nn.LayerNorm) else None
        if isinstance(identity, Identity) and identity.kind == "layernorm" and identity.width:
            found[name] = identity
    return found


def _unreached(before: Probed, norms: Mapping[str, Identity]) -> str:
    """Return why nothing is centered because of parameters that no run reached, or an empty text."""
    widths = sorted({identity.width or 0 for identity in norms.values()})
    for width in widths:
        if beyond := could_consume(before.model, before.proof.unreached, width, writing=True):
            return f"no run reached {', '.join(beyond[:3])}, which could write to its input: {MORE_INPUTS}"
    return ""


def _fold_biases(
    before: Probed,
    model: nn.Module | None,
    norms: Mapping[str, nn.Module],
    plans: Plans,
    done: Surgery,
) -> None:
    """Fold biases, and gains with them: either needs an untied head, so gains cost nothing more."""
    for name, module in norms.items():
        bias = module._parameters.get("bias")
        if bias is None or not bool(bias.detach().any()):
            done.refused.pop(name, None)
            plans.pop(name, None)
        elif name not in plans:
            reason = done.refused.get(name, "no linear layer consumes its output directly")
            done.refused[name] = reason if reason.startswith("its β") else f"its β cannot be folded: {reason}"

    accepted, rejected = settle_folds(before, {name: plans[name] for name in norms if name in plans})
    for name in rejected:
        done.refused[name] = "its β cannot be folded: something besides linear layers consumes its output"
    for name in accepted:
        if model is not None:
            fold(model, name, plans[name], done, before.model)


def _center_writers(before: Probed, model: nn.Module | None, widths: set[int], done: Surgery) -> None:
    """Center every weight that can be centered with the same outputs.

    Weights in the same place of every block are tried together. If that fails, three of them are tried alone; all are
    tried only if one of these succeeds.
    """
    made = before.model
    candidates = {
        f"{name}:{' '.join(f'{own}.{dim}' for own, dim in parameters)}": (name, parameters)
        for name, module in made.named_modules()
        for parameters in _candidates(module, widths)
    }

    def attempt(keys: Sequence[str], trial: Surgery) -> float:
        for key in keys:
            name, parameters = candidates[key]
            _center(made, made.get_submodule(name), parameters, trial)
        return before.distance(before.main)

    for group in _by_place(candidates):
        for key in _settle_place(group, attempt):
            name, parameters = candidates[key]
            if model is not None:
                _center(model, model.get_submodule(name), parameters, done)
            what = ", ".join(f"{name}.{own}".lstrip(".") for own, _ in parameters)
            done.changed[name or what] = f"mean removed from {what}"


def _by_place(names: Iterable[str]) -> list[list[str]]:
    """Group names that differ in numbers only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return list(groups.values())


def _settle_place(group: Sequence[str], attempt: Callable[[Sequence[str], Surgery], float]) -> Sequence[str]:
    """Return the accepted ones: all, or none if the first, the middle and the last also fail alone, or a search's."""
    trial = Surgery()
    if attempt(group, trial) <= EXACT:
        return group
    trial.undo()
    for name in dict.fromkeys((group[0], group[len(group) // 2], group[-1])):
        alone = Surgery()
        error = attempt([name], alone)
        alone.undo()
        if error <= EXACT:
            return list(settle(group, attempt)[0])
    return []


def _candidates(module: nn.Module, widths: set[int]) -> Iterator[list[tuple[str, int]]]:
    """Yield parameters that may write to the stream and are centered together, each with its output dimension.

    That is a linear layer's outputs, an embedding's rows, a convolution's channels, the last dimension of loose
    parameters such as a class token or position table, and each dimension but the first of experts in one tensor.
    """
    found = read_linear(module)
    weight = module._parameters.get("weight")
    if found is not None:
        if found.outputs in widths:
            bias = [] if found.bias is None else [("bias", 0)]
            yield [("weight", 1 if found.transposed else 0), *bias]
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        if module.out_channels in widths:
            yield [("weight", 0), *([] if module.bias is None else [("bias", 0)])]
    else:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter is not weight and parameter.ndim > 1:
                first = 1 if parameter.ndim == 3 else parameter.ndim - 1  # experts write along either dimension
                for dim in range(first, parameter.ndim):
                    if parameter.shape[dim] in widths:
                        yield [(name, dim)]


def _center(model: nn.Module, module: nn.Module, parameters: Sequence[tuple[str, int]], done: Surgery) -> None:
    """Subtract the mean over the outputs, in float64."""
    if isinstance(module, StreamedMap):
        module.center(done)
        return
    if isinstance(module, nn.Embedding):
        _untie_readers(model, module, done)
    for name, dim in parameters:
        parameter = module.get_parameter(name)
        done.keep(parameter)
        values = parameter.detach().cpu().double()
        with torch.no_grad():
            parameter.copy_(values - values.mean(dim, keepdim=True))


def _untie_readers(model: nn.Module, embedding: nn.Module, done: Surgery) -> None:
    """Untie modules that share the embedding's weight, such as the head: their weight must not change."""
    weight = embedding._parameters["weight"]
    for module in model.modules():
        if module is not embedding and module._parameters.get("weight") is weight:
            untie(model, module, done)


def _replace(model: nn.Module, name: str, found: object, done: Surgery) -> None:
    """Replace a LayerNorm by an RMSNorm with the same gain and ε."""
    parent, _, child = name.rpartition(".")
    before = model.get_submodule(name)
    assert isinstance(found, Identity)
    assert found.width is not None
    gain = None if found.gain is None else before.get_parameter(found.gain)
    with torch.device("meta"):
        new = RMSNorm(found.width, found.eps, gain is not None, gain_offset=found.gain_offset)
    if gain is not None:
        new._parameters["weight"] = gain
    done.set_module(model.get_submodule(parent), child, new.train(before.training))
