"""Replaces norms by omninorm's, in place and with the same parameters; can be undone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from omninorm.layers import GatedRMSNorm, LayerNorm, RMSNorm
from omninorm.layers.identify import Identity, Refusal, identify
from omninorm.layers.recognize import GATES
from omninorm.surgery.report import Report, check_intact, check_model, numbered
from omninorm.surgery.swap_gated import build_gated

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_OURS = (RMSNorm, LayerNorm, GatedRMSNorm)


@dataclass
class _Place:
    """A place where a module is registered, with the module before and after."""

    parent: nn.Module
    child: str
    before: nn.Module
    after: nn.Module

    def is_intact(self) -> bool:
        return self.parent._modules.get(self.child) is self.after


@dataclass(repr=False)
class SwapReport(Report):
    """The result of `swap_norms`. `undo` restores the modules; parameters are shared, so training is kept."""

    _places: list[_Place] = field(default_factory=list, repr=False)

    def counts(self) -> list[str]:
        return [numbered(len(self.changed), "norm", "swapped")]

    def undo(self) -> None:
        """Put the original modules back.

        Raises:
            InputError: a later operation has replaced some of them; then nothing is restored.
        """
        check_intact([place.is_intact for place in self._places])
        for place in self._places:
            place.parent._modules[place.child] = place.before
        self._places.clear()


def swap_norms(model: nn.Module) -> SwapReport:
    """Replace every module that computes RMSNorm, gated or not, or LayerNorm by omninorm's, in place.

    Parameters stay the same objects, so ties, optimizers and state dicts are unaffected; hooks are kept. A norm is
    replaced only if omninorm's computes the same: with the same gain, bias and ε and, if its parameters have 16 bits,
    the same order of rounding.

    Returns:
        A report: `changed` (name → new module), `refused` (name → reason), `table()`, `undo()`.

    Raises:
        InputError: it is not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> swap_norms(model).changed
        {'1': 'LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)'}
    """
    check_model(model)
    report = SwapReport()
    known: dict[int, nn.Module | str] = {}
    for name, parent, child, module in list(_registered(model)):
        if isinstance(module, _OURS):
            continue
        if id(module) not in known:
            known[id(module)] = _replacement(module)
        found = known[id(module)]
        if isinstance(found, nn.Module):
            report._places.append(_Place(parent, child, module, found))
            parent._modules[child] = found
            report.changed[name] = repr(found)
        elif looks_like_a_norm(module):
            report.refused[name] = found
    return report


@contextmanager
def swapped(model: nn.Module) -> Iterator[SwapReport]:
    """Apply `swap_norms` inside a `with` block."""
    report = swap_norms(model)
    try:
        yield report
    finally:
        report._places = [
            place for place in report._places if place.is_intact()
        ]  # modules replaced inside the block are left alone
        report.undo()


def looks_like_a_norm(module: nn.Module) -> bool:
    """Return whether a report should mention the module if it is not replaced; nothing else depends on its name."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def build(found: Identity, module: nn.Module) -> nn.Module | str:
    """Return omninorm's norm with the module's parameters, or the reason why there is none."""
    gain = None if found.gain is None else module.get_parameter(found.gain)
    if found.width is None:
        return "it has no parameters, so its width is unknown"
    if found.gain not in (None, "weight") or found.bias not in (None, "bias"):
        return f"its parameters are named {found.gain!r} and {found.bias!r}: the state dict would change"
    if found.cast is None and gain is not None and gain.dtype in _LOW_PRECISION:
        return f"in {gain.dtype} it rounds in an order that omninorm does not have"
    with torch.device("meta"):  # the parameters come from the module
        if found.kind == "rmsnorm":
            cast = found.cast or "fp32"
            new: nn.Module = RMSNorm(found.width, found.eps, gain is not None, gain_offset=found.gain_offset, cast=cast)
        elif found.gain_offset:
            return "its gain is one plus a parameter, which omninorm's LayerNorm does not support"
        else:
            new = LayerNorm(found.width, found.eps, gain is not None, found.bias is not None)
    for name in ("weight", "bias"):
        if new._parameters.get(name) is not None:
            new._parameters[name] = module._parameters[name]
    return new


def _replacement(module: nn.Module) -> nn.Module | str:
    if "forward" in vars(module):
        return "its forward was replaced on the instance, for example by accelerate's hooks; remove them first"
    new: nn.Module | str
    if more := _other_inputs(module):
        if len(more) > 1 or more[0] not in GATES:
            return f"its forward also takes {', '.join(map(repr, more))}, which omninorm's norms do not"
        new = build_gated(module)
    else:
        found = identify(module)
        new = found.reason if isinstance(found, Refusal) else build(found, module)
    if isinstance(new, str):
        return new
    for name, value in vars(module).items():
        # Keep hooks, and attributes that other code may read, such as variance_epsilon.
        if name.endswith("hooks") or name not in vars(new):
            new.__dict__[name] = value
    return new.train(module.training)


def _other_inputs(module: nn.Module) -> list[str]:
    """Return the names of what a forward takes after its first argument, such as a gate or a residual."""
    try:
        names = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in names[1:] if each.kind not in kinds]


def _registered(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Yield (name, parent, name in the parent, module) for every place; a shared module appears once per place."""
    for name, parent in model.named_modules():
        for child, module in parent._modules.items():
            if module is not None:
                yield f"{name}.{child}".lstrip("."), parent, child, module
