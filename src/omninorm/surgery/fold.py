"""Folds gains and biases of norms into the linear layers that consume their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.surgery.flow import Reader, Reading, trace
from omninorm.surgery.gains import Gain, find_gains
from omninorm.surgery.linear import LinearMap, read_linear
from omninorm.surgery.proof import could_consume
from omninorm.surgery.report import Surgery
from omninorm.surgery.settle import Probed, settle
from omninorm.surgery.streamed_map import StreamedMap
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
    return Probed(made, read_probes(made, inputs), drawn=inputs is None)


@contextmanager
def undone_by_errors(done: Surgery) -> Iterator[None]:
    """Undo the operation after an error in the `with` block."""
    try:
        yield
    except BaseException:
        done.undo()
        raise


Plans = dict[str, "Plan"]


@dataclass(frozen=True)
class Plan:
    """A norm with its gain, and the parameters that consume its output."""

    gain: Gain
    readers: list[Reader]

    def __str__(self) -> str:
        kind = "" if self.gain.kind in ("RMSNorm", "LayerNorm") else f" ({self.gain.kind})"
        return f"into {', '.join(dict.fromkeys(reader.name for reader in self.readers))}{kind}"


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
        done.changed[name] = str(plans[name])
        done.error = max(done.error, error)
    done.proof = before.proof
    if not done.changed:
        done.undo()


def settle_folds(before: Probed, plans: Plans) -> tuple[dict[str, float], dict[str, float]]:
    """Fold those of the norms that preserve the outputs; see `settle`."""

    def attempt(names: Sequence[str], trial: Surgery) -> float:
        for name in names:
            fold(before.model, name, plans[name], trial, before.model)
        return before.distance()

    return settle(list(plans), attempt)


def plan_folds(before: Probed, refused: dict[str, str], new_biases: bool) -> Plans:
    """Return the consumers of every norm that has something to fold and, in these runs, only linear consumers."""
    model = before.model
    gains = {
        name: gain
        for name, gain in find_gains(model, before.main).items()
        if gain.gain is not None or gain.bias is not None
    }
    streamed = [name for name, module in model.named_modules() if isinstance(module, StreamedMap)]
    reading = trace(model, list(gains), streamed, before.runs)
    for name in gains.keys() - reading.readers.keys():
        refused[name] = "no run reached it"
    plans = {}
    for name, gain in gains.items():
        why = _why_not(before, name, gain, reading, new_biases)
        if why:
            refused[name] = why
        else:
            plans[name] = Plan(gain, reading.readers[name])
    return plans


def _why_not(before: Probed, name: str, gain: Gain, reading: Reading, new_biases: bool) -> str:
    """Return why a norm cannot be folded, or an empty text."""
    model, readers = before.model, reading.readers[name]
    others = [each for norm, found in reading.readers.items() if norm != name for each in found]
    taken = {(each.module, each.own) for each in others}
    if not readers:
        first = f" ({reading.others[name]})" if name in reading.others else ""
        return f"no linear layer consumes its output directly{first}"
    if any((each.module, each.own) in taken for each in readers):
        return "a linear layer that consumes its output also consumes another norm's"
    if name in reading.others:
        return f"something besides linear layers consumes its output ({reading.others[name]})"
    for each in readers:
        if (each.module, each.own) in reading.strangers:
            what = reading.strangers[each.module, each.own]
            return f"something besides linear layers consumes its output: {each.name} also takes part in {what}"
    if len({(each.module, each.own) for each in readers}) < len(readers):
        return f"{readers[0].name} consumes its output in two ways"
    width = _width(model, name, gain)
    if unreached := could_consume(model, before.proof.unreached, width):
        return f"no run reached {', '.join(unreached[:3])}, which could consume its output: {MORE_INPUTS}"
    if _has_bias(model, name, gain):
        return _why_no_bias(model, readers, new_biases)
    return ""


MORE_INPUTS = "pass inputs=[…] that reach it, or remove it from the model"


def _why_no_bias(model: nn.Module, readers: Sequence[Reader], new_biases: bool) -> str:
    """Return why β cannot be folded into these consumers, or an empty text."""
    for each in readers:
        found = read_linear(model.get_submodule(each.module)) if each.own == "weight" else None
        if found is None or (found.bias is None and not new_biases):
            return f"its β is not zero, and {each.name}, which consumes its output, has no bias to take it"
    return ""


def _width(model: nn.Module, name: str, gain: Gain) -> int:
    own = gain.gain or gain.bias
    assert own is not None
    return model.get_submodule(name).get_parameter(own).shape[-1]


def _has_bias(model: nn.Module, name: str, gain: Gain) -> bool:
    return gain.bias is not None and bool(model.get_submodule(name).get_parameter(gain.bias).detach().any())


def fold(model: nn.Module, name: str, plan: Plan, done: Surgery, measured: nn.Module) -> None:
    """Fold one norm's gain and bias into its consumers.

    They are identified on `measured`, the copy in float64 (or the model itself): the user's own modules are never
    called, as they may have hooks or lie on another device.
    """
    norm, found = model.get_submodule(name), plan.gain
    gain = None if found.gain is None else norm.get_parameter(found.gain)
    bias = None if found.bias is None else norm.get_parameter(found.bias)
    factor = None if gain is None else gain.detach().cpu().double() + found.gain_offset
    shift = None if bias is None else bias.detach().cpu().double()
    for reader in plan.readers:
        features = list(reader.features)
        _fold_into(
            model,
            reader,
            None if factor is None else factor[features],
            None if shift is None or not bool(shift.any()) else shift[features],
            done,
            measured,
        )
    for where, own in [(name, found.gain), (name, found.bias)] + [
        (each.module, own) for each in plan.readers for own in (each.own, "bias")
    ]:
        if own is not None and model.get_submodule(where)._parameters.get(own) is not None:
            done.rely_on(model, where, own)
    with torch.no_grad():
        if gain is not None:
            done.keep(gain)
            gain.fill_(1.0 - found.gain_offset)
        if bias is not None:
            done.keep(bias)
            bias.zero_()


def _fold_into(
    model: nn.Module,
    reader: Reader,
    factor: Tensor | None,
    shift: Tensor | None,
    done: Surgery,
    measured: nn.Module,
) -> None:
    """Scale one consumer's parameter along its dimension; a shift needs a linear layer's bias."""
    module = model.get_submodule(reader.module)
    if isinstance(module, StreamedMap):
        module.scale(factor, shift, done)
        return
    untie(model, module, done, reader.own)
    if shift is not None:
        found = read_linear(measured.get_submodule(reader.module))
        assert found is not None
        _shift(replace(found, module=module), shift, done)
    if factor is not None:
        parameter = module.get_parameter(reader.own)
        done.keep(parameter)
        shape = [-1 if dim == reader.dim else 1 for dim in range(parameter.ndim)]
        with torch.no_grad():
            parameter.copy_(parameter.cpu().double() * factor.view(shape))


def untie(model: nn.Module, module: nn.Module, done: Surgery, own: str = "weight") -> None:
    """Give a module that shares a parameter with another one a copy of it."""
    weight = module._parameters[own]
    assert weight is not None
    holders = [
        other
        for other in model.modules()
        if other is not module and any(p is weight for p in other._parameters.values())
    ]
    if not holders:
        return
    done.set_parameter(module, own, nn.Parameter(weight.detach().clone(), weight.requires_grad))
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None):
        assert config is not None
        config.tie_word_embeddings = False
        done.later(lambda: setattr(config, "tie_word_embeddings", True))


def untie_head(model: nn.Module, done: Surgery) -> None:
    """Call `model.untie_head()` of a model that uses its embedding as its head; it returns how to undo that."""
    if callable(ask := getattr(model, "untie_head", None)):
        done.later(ask())


def _shift(found: LinearMap, shift: Tensor, done: Surgery) -> None:
    """Set b ← b + W·shift, computed in float64."""
    weight, bias = found.weight, found.bias
    matrix = weight.detach().cpu().double()
    moved = (matrix.T if found.transposed else matrix) @ shift
    with torch.no_grad():
        if bias is None:
            new = nn.Parameter(moved.to(weight.dtype).to(weight.device), weight.requires_grad)
            done.set_parameter(found.module, "bias", new)
        else:
            done.keep(bias)
            bias.copy_(bias.cpu().double() + moved)
