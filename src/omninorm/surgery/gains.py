"""Recognizes γ and β of norms by calling them as the model does, whatever else they take or group.

`identify` knows norms that omninorm's can replace. A gain can be folded out of more: gated norms, norms of groups of
features, norms that add one to their parameter. This only needs f = γ·g + β, with g the same for every γ and β.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.layers import LayerNorm, RMSNorm
from omninorm.surgery.modes import InDouble
from omninorm.surgery.runs import Run, call

_CLOSE = 1e-9
_LARGE = 2.0**24


@dataclass(frozen=True)
class Gain:
    """The parameters of a norm, as `Identity` has them, and what kind of norm it is.

    Args:
        gain: the name of the parameter that holds γ, or None.
        gain_offset: added to that parameter to get γ.
        bias: the name of the parameter that holds β, or None.
        kind: such as "gated RMSNorm over groups".
    """

    gain: str | None
    gain_offset: float
    bias: str | None
    kind: str


def find_gains(model: nn.Module, runs: Sequence[Run]) -> dict[str, Gain]:
    """Return the norms of a model in float64 by name, with their gains.

    Args:
        model: a copy in float64, in which `shadow` has replaced the norms that omninorm's can replace.
        runs: what to run, to see how the norms are called.
    """
    found: dict[str, Gain] = {}
    waiting: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if (ours := _ours(module)) is not None:
            found[name] = ours
        elif _may_be(module):
            waiting[name] = module
    for name, (args, kwargs) in _calls(model, waiting, runs).items():
        gain = _by_calling(waiting[name], args, kwargs)
        if gain is not None:
            found[name] = gain
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def _ours(module: nn.Module) -> Gain | None:
    """Return the gain of a norm of omninorm's; `shadow` has replaced all others that are supported."""
    if not isinstance(module, (RMSNorm, LayerNorm)):
        return None
    names = [name if module._parameters.get(name) is not None else None for name in ("weight", "bias")]
    return Gain(names[0], getattr(module, "gain_offset", 0.0), names[1], type(module).__name__)


def _may_be(module: nn.Module) -> bool:
    """Return whether a module has nothing but vectors of one size."""
    parameters = [value for value in module._parameters.values() if value is not None]
    sizes = {tuple(value.shape) for value in parameters}
    vectors = len(sizes) == 1 and len(next(iter(sizes))) == 1 and 1 <= len(parameters) <= 2
    return vectors and next(iter(sizes))[0] > 1 and not any(True for _ in module.children())


def _calls(model: nn.Module, modules: dict[str, nn.Module], runs: Sequence[Run]) -> dict[str, tuple[Any, Any]]:
    """Return the arguments with which each module is called first."""
    found: dict[str, tuple[Any, Any]] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in found:
                found[name] = copy.deepcopy((args, kwargs))

        return hook

    hooks = [module.register_forward_pre_hook(look(name), with_kwargs=True) for name, module in modules.items()]
    try:
        for run in runs if modules else ():
            call(model, run)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Called:
    """A module with arguments, of which the first may be another, and with other parameters."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.module, self.args, self.kwargs = copy.deepcopy(module).eval(), args, kwargs
        for name in [name for name in vars(self.module) if name.endswith("hooks")]:
            getattr(self.module, name).clear()
        self.x: Tensor = args[0] if args else next(iter(kwargs.values()))

    def __call__(self, x: Tensor | None = None) -> Tensor:
        args, kwargs = self.args, dict(self.kwargs)
        if x is not None and args:
            args = (x, *args[1:])
        elif x is not None:
            kwargs[next(iter(kwargs))] = x
        with torch.no_grad(), InDouble():
            return self.module(*copy.deepcopy(args), **copy.deepcopy(kwargs))  # type: ignore[no-any-return]

    def set(self, name: str | None, value: Tensor | float) -> None:
        if name is not None:
            with torch.no_grad():
                self.module._parameters[name].copy_(torch.as_tensor(value, dtype=torch.float64))  # type: ignore[union-attr]


def _by_calling(module: nn.Module, args: Any, kwargs: Any) -> Gain | None:
    """Return the gain of a norm that was called with these arguments; None if it is not one."""
    try:
        called = _Called(module, args, kwargs)
        names = list(called.module._parameters)
        width = called.module._parameters[names[0]].shape[0]  # type: ignore[union-attr]
        y = called()
        if not isinstance(y, Tensor) or y.shape[-1:] != (width,) or not bool(y.any()):
            return None
        names = [name for name in names if called.module._parameters[name] is not None]
        for gain in names:
            bias = next((name for name in names if name != gain), None)
            for offset in (0.0, 1.0):
                if _scales(called, gain, offset, bias, width) and _normalizes(called):
                    return Gain(gain, offset, bias, _kind(called, offset, gain, bias))
    except Exception:  # whatever a module makes of it: it is not a norm
        return None
    return None


def _scales(called: _Called, gain: str, offset: float, bias: str | None, width: int) -> bool:
    """Return whether the output is (parameter + offset)·g plus the bias."""
    generator = torch.Generator().manual_seed(0)
    factor, shift = (0.5 + torch.rand(width, generator=generator, dtype=torch.float64) for _ in range(2))
    called.set(gain, 1 - offset)
    called.set(bias, 0.0)
    plain = called()
    called.set(gain, factor.to(plain.device) - offset)
    called.set(bias, shift)
    expected = factor.to(plain.device) * plain + (shift.to(plain.device) if bias else 0)
    return bool(plain.any()) and _close(called(), expected)


def _normalizes(called: _Called) -> bool:
    """Return whether the size of the input is divided out."""
    return _close(called(called.x * _LARGE), called(called.x * 2 * _LARGE))


def _kind(called: _Called, offset: float, gain: str, bias: str | None) -> str:
    """Return what kind of norm it is."""
    called.set(gain, 1 - offset)
    called.set(bias, 0.0)
    x, width = called.x * _LARGE, called.x.shape[-1]
    centered = _close(called(x), called(x + 8 * _LARGE))
    other = x.clone()
    other[..., : width // 2] *= 4
    grouped = width > 3 and _close(called(other)[..., width // 2 :], called(x)[..., width // 2 :])
    tensors = [each for each in (*called.args, *called.kwargs.values()) if isinstance(each, Tensor)]
    words = ["gated"] if len(tensors) > 1 else []
    words.append("LayerNorm1P" if centered and offset else "LayerNorm" if centered else "RMSNorm")
    return " ".join([*words, "over groups"] if grouped else words)


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= max(_CLOSE * float(b.abs().max()), 1e-30)
