"""Folds gains and biases of norms into the linear layers that consume their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.layers.identify import Identity, identify
from omninorm.surgery.flow import trace
from omninorm.surgery.linear import LinearMap, read_linear
from omninorm.surgery.report import Surgery
from omninorm.surgery.settle import Probed, settle
from omninorm.surgery.streamed import StreamedMap
from omninorm.surgery.verify import read_probes, shadow


def fold_gains(model: nn.Module, inputs: Sequence[Any] | None = None, *, new_biases: bool = True) -> Surgery:
    """Fold γ and β of every norm into the linear layers that consume its output, in place.

        W·(γ·x̂ + β) + b = (W·diag γ)·x̂ + (b + W·β)

    Afterwards γ is 1 (0 if the norm adds one to it) and β is 0. The products are computed in float64 and rounded to the
    weights' dtype once. Consumers are found by running a copy of the model; a norm is refused unless the outputs of the
    copy in float64 stay the same, which shows that nothing else consumes it. A head that is tied to the embedding is
    untied first.

    Args:
        model: any model whose norms `identify` knows.
        inputs: probes as in `verify`; None means random tokens.
        new_biases: whether a linear layer without a bias may get one for β. False refuses such norms, for checkpoints
            whose class has no place for it.

    Returns:
        A report: `changed` (name → consumers), `refused` (name → reason), `error`, `table()`, `undo()`.

    Raises:
        InputError: weights that are quantized or have no values, or inputs that the model does not take.
    """
    before = probe(model, inputs)
    done = Surgery(device=before.device)
    with undone_by_errors(done):
        untie_head(model, done)
        fold_all(before, model, done, new_biases)
        done.finish()
    return done


def probe(model: nn.Module, inputs: Sequence[Any] | None) -> Probed:
    """Return a copy in float64 with an untied head, and its outputs for the inputs."""
    made = shadow(model)
    untie_head(made, Surgery())
    return Probed(made, read_probes(made, inputs))


@contextmanager
def undone_by_errors(done: Surgery) -> Iterator[None]:
    """Undo the operation after an error in the `with` block."""
    try:
        yield
    except BaseException:
        done.undo()
        raise


def fold_all(before: Probed, model: nn.Module | None, done: Surgery, new_biases: bool) -> None:
    """Fold what can be folded in a float64 copy, and in the original model, if any."""
    plans = plan_folds(before, done.refused, new_biases)
    accepted, rejected = settle_folds(before, plans)
    for name, error in rejected.items():
        done.refused[name] = (
            f"something besides linear layers consumes its output (the outputs would change by {error:.1e})"
        )
    for name, error in accepted.items():
        if model is not None:
            fold(model, name, plans[name], done, before.model)
        done.changed[name] = f"into {', '.join(plans[name])}"
        done.error = max(done.error, error)
    if not done.changed:
        done.undo()


def settle_folds(before: Probed, plans: Mapping[str, Sequence[str]]) -> tuple[dict[str, float], dict[str, float]]:
    """Fold those of the norms that preserve the outputs; see `settle`."""

    def attempt(names: Sequence[str], trial: Surgery) -> float:
        for name in names:
            fold(before.model, name, plans[name], trial, before.model)
        return before.distance()

    return settle(list(plans), attempt)


def plan_folds(before: Probed, refused: dict[str, str], new_biases: bool) -> dict[str, list[str]]:
    """Return the consumers of every norm that has something to fold and, in this run, only linear consumers."""
    model = before.model
    norms = {
        name: identity for name, module in model.named_modules() if isinstance(identity := _identity(module), Identity)
    }
    maps = {name: module for name, module in model.named_modules() if _reads(module)}
    reading = trace(model, list(norms), maps, before.probes)
    counted = [reader for readers in reading.readers.values() for reader in readers]
    plans = {}
    for name, identity in norms.items():
        readers = reading.readers[name]
        if identity.gain is None and identity.bias is None:
            continue
        if not readers:
            refused[name] = "no linear layer consumes its output directly"
        elif any(counted.count(reader) > 1 for reader in readers):
            refused[name] = "a linear layer that consumes its output also consumes another norm's"
        elif (
            not new_biases
            and _has_bias(model, name, identity)
            and (lacking := [each for each in readers if not _takes_bias(model, each)])
        ):
            refused[name] = f"its β is not zero, and {lacking[0]}, which consumes its output, has no bias to take it"
        else:
            plans[name] = readers
    return plans


def _has_bias(model: nn.Module, name: str, identity: Identity) -> bool:
    return identity.bias is not None and bool(model.get_submodule(name).get_parameter(identity.bias).detach().any())


def _takes_bias(model: nn.Module, name: str) -> bool:
    return model.get_submodule(name)._parameters.get("bias") is not None


def fold(model: nn.Module, name: str, readers: Sequence[str], done: Surgery, measured: nn.Module) -> None:
    """Fold one norm's gain and bias into its consumers.

    They are identified on `measured`, the copy in float64 (or the model itself): the user's own modules are never
    called, as they may have hooks or lie on another device.
    """
    norm = model.get_submodule(name)
    identity = identify(measured.get_submodule(name))
    assert isinstance(identity, Identity)
    gain = None if identity.gain is None else norm.get_parameter(identity.gain)
    bias = None if identity.bias is None else norm.get_parameter(identity.bias)
    factor = None if gain is None else gain.detach().cpu().double() + identity.gain_offset
    shift = None if bias is None else bias.detach().cpu().double()
    for reader in readers:
        module = model.get_submodule(reader)
        untie(model, module, done)
        found = read_linear(measured.get_submodule(reader))
        assert found is not None
        if isinstance(module, StreamedMap):
            module.scale(factor, shift, done)
        else:
            _scale(replace(found, module=module), factor, shift, done)
    for where, owns in {
        name: (identity.gain, identity.bias),
        **dict.fromkeys(readers, ("weight", "bias")),
    }.items():
        for own in owns:
            if own is not None and model.get_submodule(where)._parameters.get(own) is not None:
                done.rely_on(model, where, own)
    with torch.no_grad():
        if gain is not None:
            done.keep(gain)
            gain.fill_(1.0 - identity.gain_offset)
        if bias is not None:
            done.keep(bias)
            bias.zero_()


def untie(model: nn.Module, module: nn.Module, done: Surgery) -> None:
    """Give a module that shares its weight with another one a copy of it."""
    weight = module._parameters["weight"]
    assert weight is not None
    holders = [
        other
        for other in model.modules()
        if other is not module and any(p is weight for p in other._parameters.values())
    ]
    if not holders:
        return
    done.set_parameter(module, "weight", nn.Parameter(weight.detach().clone(), weight.requires_grad))
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None):
        assert config is not None
        config.tie_word_embeddings = False
        done.later(lambda: setattr(config, "tie_word_embeddings", True))


def untie_head(model: nn.Module, done: Surgery) -> None:
    """Call `model.untie_head()` of a model that uses its embedding as its head; it returns how to undo that."""
    if callable(ask := getattr(model, "untie_head", None)):
        done.later(ask())


def _scale(found: LinearMap, factor: Tensor | None, shift: Tensor | None, done: Surgery) -> None:
    """Set W ← W·diag(factor), b ← b + W·shift, computed in float64."""
    weight, bias = found.weight, found.bias
    matrix = weight.detach().cpu().double()
    matrix = matrix.T if found.transposed else matrix  # (outputs, inputs)
    with torch.no_grad():
        if shift is not None and bool(shift.any()):
            moved = matrix @ shift
            if bias is None:
                new = nn.Parameter(moved.to(weight.dtype).to(weight.device), weight.requires_grad)
                done.set_parameter(found.module, "bias", new)
            else:
                done.keep(bias)
                bias.copy_(bias.cpu().double() + moved)
        if factor is not None:
            done.keep(weight)
            scaled = matrix * factor
            weight.copy_(scaled.T if found.transposed else scaled)


def _identity(module: nn.Module) -> object:
    """Return the identity of a norm of omninorm's; `shadow` has replaced all others that are supported."""
    from omninorm.layers import LayerNorm, RMSNorm

    return identify(module) if isinstance(module, (LayerNorm, RMSNorm)) else None


def _reads(module: nn.Module) -> bool:
    found = read_linear(module)
    return found is not None and found.inputs is not None
