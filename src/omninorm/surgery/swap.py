"""Norms replaced by omninorm's, in place, with the same parameters, and a way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from omninorm.layers import LayerNorm, RMSNorm
from omninorm.surgery.identify import Identity, Refusal, identify
from omninorm.surgery.report import Report, check_intact

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_OURS = (RMSNorm, LayerNorm)


@dataclass
class _Place:
    """Where a module is registered, what it was, and what it is now."""

    parent: nn.Module
    child: str
    before: nn.Module
    after: nn.Module

    def is_intact(self) -> bool:
        return self.parent._modules.get(self.child) is self.after


@dataclass
class SwapReport(Report):
    """What `swap_norms` did. `undo` puts the modules back; what was trained meanwhile stays: parameters are shared."""

    _places: list[_Place] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Puts every module back.

        Raises:
            InputError: a later operation has replaced some of them; nothing is put back then.
        """
        check_intact([place.is_intact for place in self._places])
        for place in self._places:
            place.parent._modules[place.child] = place.before
        self._places.clear()


def swap_norms(model: nn.Module) -> SwapReport:
    """Replaces every norm that turns out to be RMSNorm or LayerNorm by omninorm's, in place.

    Parameters stay the same objects, so ties, optimizers and state dicts are as before; hooks move along. A norm is
    replaced only where omninorm's computes what it does: same gain, bias and ε and, where its parameters have 16 bits,
    the same order of rounding.

    Returns:
        A report: `changed` (name → what it is now), `refused` (name → why not), `undo()`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> swap_norms(model).changed
        {'1': 'LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)'}
    """
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
    """`swap_norms` for the time that the context is entered."""
    report = swap_norms(model)
    try:
        yield report
    finally:
        report._places = [place for place in report._places if place.is_intact()]  # others were replaced meanwhile
        report.undo()


def looks_like_a_norm(module: nn.Module) -> bool:
    """Whether a reader would expect to hear of it: only reports depend on this."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def build(found: Identity, module: nn.Module) -> nn.Module | str:
    """omninorm's norm with the module's parameters, or why there is none."""
    gain = None if found.gain is None else module.get_parameter(found.gain)
    if found.width is None:
        return "it has no parameters, so its width is not known"
    if found.gain not in (None, "weight") or found.bias not in (None, "bias"):
        return f"its parameters are named {found.gain!r} and {found.bias!r}: a state dict would no longer fit"
    if found.cast is None and gain is not None and gain.dtype in _LOW_PRECISION:
        return f"in {gain.dtype} it rounds in an order that omninorm's norm does not have"
    with torch.device("meta"):  # the parameters come from the module
        if found.kind == "rmsnorm":
            cast = found.cast or "fp32"
            new: nn.Module = RMSNorm(found.width, found.eps, gain is not None, gain_offset=found.gain_offset, cast=cast)
        elif found.gain_offset:
            return "its gain is one plus a parameter, which omninorm's LayerNorm does not have"
        else:
            new = LayerNorm(found.width, found.eps, gain is not None, found.bias is not None)
    for name in ("weight", "bias"):
        if new._parameters.get(name) is not None:
            new._parameters[name] = module._parameters[name]
    return new


def _replacement(module: nn.Module) -> nn.Module | str:
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as accelerate's hooks do: remove them first"
    found = identify(module)
    if isinstance(found, Refusal):
        return found.reason
    new = build(found, module)
    if isinstance(new, str):
        return new
    for name, value in vars(module).items():
        # Hooks move along; so does what others may read, such as variance_epsilon.
        if name.endswith("hooks") or name not in vars(new):
            new.__dict__[name] = value
    return new.train(module.training)


def _registered(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(name, parent, name in the parent, module) of every place, also of modules that stand in several."""
    for name, parent in model.named_modules():
        for child, module in parent._modules.items():
            if module is not None:
                yield f"{name}.{child}".lstrip("."), parent, child, module
