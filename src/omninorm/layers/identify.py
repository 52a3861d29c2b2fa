"""Identifies norms by probing; class names do not matter.

A copy of the module, with random parameters, is called with float64 inputs that test these properties:

    odd               f(x) + f(−x) = 2β, the same for all rows
    rows              a row's output does not depend on other rows
    scale             f(2²⁵x) = f(2¹⁵x): each row is divided by its size
    shift             f(x + c) = f(x): the mean is subtracted, so the module is a LayerNorm
    shape             f(x) − β = γ·x̂, with one γ for all rows and x̂ RMSNorm's or LayerNorm's
    gain, bias        γ is a parameter, or one plus a parameter, or 1; β is a parameter or 0
    ε                 measured at rows whose mean square is near it: r = 1/√(mean square + ε), and not 1/(rms + ε)
    rounding          compared in bfloat16, bit for bit: whether x̂ is rounded before the product with γ

A module that lacks one of them is refused; the first missing property is the reason.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from omninorm import functional
from omninorm.config import CASTS
from omninorm.errors import InputError

_ROWS = (3, 5)
_FREE_WIDTH = 64  # the width at which a norm without parameters is probed
# Modules that compute in float32 internally are accurate to about 1e-6 of the largest output.
_CLOSE = 1e-5
_EPS_CLOSE = 1e-4
_LOG2_SCALES = range(0, -80, -1)


@dataclass(frozen=True)
class Identity:
    """A norm over the last dimension.

    Args:
        kind: "rmsnorm" or "layernorm".
        width: the number of features; None for a norm that takes any width.
        eps: ε, added to the mean square or the variance; None means the machine epsilon of the compute dtype.
        gain: the name of the parameter that holds γ, or None.
        gain_offset: the number that is added to this parameter to get γ: 0, or 1 in Gemma's form.
        bias: the name of the parameter that holds β, or None.
        cast: "fp32" or "llama", as in NormConfig, if a bfloat16 copy agrees with omninorm's norm bit for bit, except
            for at most one element in a hundred, off by two units in the last place at most; None if it rounds
            differently.
    """

    kind: str
    width: int | None
    eps: float | None
    gain: str | None
    gain_offset: float
    bias: str | None
    cast: str | None


@dataclass(frozen=True)
class Refusal:
    """The reason why a module is not a norm that can be replaced."""

    reason: str


class RefusedError(Exception):
    """A module lacks a property of norms."""


def identify(module: nn.Module) -> Identity | Refusal:
    """Identify a norm by probing a copy of it; the module itself is not called.

    Returns:
        An `Identity` for RMSNorm and LayerNorm over the last dimension, of any class; otherwise a `Refusal`.

    Raises:
        InputError: `module` is not a torch.nn.Module.

    Example:
        >>> identify(nn.LayerNorm(8, eps=1e-5))
        Identity(kind='layernorm', width=8, eps=1e-05, gain='weight', gain_offset=0.0, bias='bias', cast='fp32')
        >>> identify(nn.Linear(8, 8))
        Refusal(reason='its parameters are not vectors of one size')
    """
    if not isinstance(module, nn.Module):
        raise InputError("model must be a torch.nn.Module", f"a {type(module).__name__}", "pass the model itself")
    try:
        return _Probe(module).identity()
    except RefusedError as refused:
        return Refusal(str(refused))


class _Probe:
    """A copy of a module that can be called and changed."""

    def __init__(self, module: nn.Module) -> None:
        self.width = _width(module)
        try:
            self.module = copy.deepcopy(module).eval()
        except Exception as error:  # a module may hold anything
            raise RefusedError(f"it cannot be copied ({type(error).__name__})") from error
        _forget_hooks(self.module)
        self.module.to(device="cpu", dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(0)
        for parameter in self.module.parameters():
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=self.generator, dtype=torch.float64)

    def identity(self) -> Identity:
        x = torch.randn(*_ROWS, self.width or _FREE_WIDTH, generator=self.generator, dtype=torch.float64)
        x = x + 0.3  # rows whose means are not 0
        large = x * 2**15
        self._check_rows(large)
        bias = self._bias(large)
        centered = self._close(self.run(large), self.run(large + 2**17))
        gain = self._gain(large, bias, centered)
        gain_name, offset = self._name_of_gain(gain)
        bias_name = self._name_of_bias(bias)
        if not centered and bias_name is not None:
            raise RefusedError("it has a bias but does not subtract the mean")
        eps = self._eps(x, gain, bias, centered)
        kind = "layernorm" if centered else "rmsnorm"
        found = Identity(kind, self.width, eps, gain_name, offset, bias_name, None)
        return Identity(**{**vars(found), "cast": self._cast(found)})

    def run(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        try:
            with torch.no_grad():
                y = self.module(x.clone())
        except Exception as error:  # its forward may need other arguments, and raise anything
            said = f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
            raise RefusedError(
                f"it cannot be called with a single tensor of shape {tuple(x.shape)} ({said})"
            ) from error
        if not isinstance(y, Tensor):
            raise RefusedError(f"it returns a {type(y).__name__}, not a tensor")
        if y.shape != x.shape or not y.is_floating_point():
            raise RefusedError(f"it maps the shape {tuple(x.shape)} to {tuple(y.shape)} of {y.dtype}")
        return y.double()

    # The probes, in the order of the module docstring ------------------------------------------------------------

    def _check_rows(self, x: Tensor) -> None:
        y = self.run(x)
        if not y.isfinite().all():
            raise RefusedError("its outputs are not finite")
        if not torch.equal(y, self.run(x)):
            raise RefusedError("it returns different outputs for the same input")
        other = x.clone()
        other[0] = x[0].flip(0) * 3
        if not self._close(self.run(other)[1:], y[1:]):
            raise RefusedError(
                "a row's output depends on other rows, so it does not normalize the last dimension alone"
            )
        if not self._close(self.run(x * 2**10), y):
            raise RefusedError("its output grows with its input, so it does not normalize")

    def _bias(self, x: Tensor) -> Tensor:
        """Return β, the even part of f."""
        even = (self.run(x) + self.run(-x)) / 2
        if not self._close(even, even[:1, :1].expand_as(even), like=self.run(x)):
            raise RefusedError("f(−x) is not −f(x) plus a constant bias")
        return even.flatten(0, -2).mean(0)

    def _gain(self, x: Tensor, bias: Tensor, centered: bool) -> Tensor:
        """Return γ, the same for all rows."""
        normed, odd = normalize(x, centered), self.run(x) - bias
        gain = (odd * normed).flatten(0, -2).sum(0) / normed.square().flatten(0, -2).sum(0)
        if not self._close(gain * normed, odd):
            raise RefusedError("it is neither RMSNorm nor LayerNorm over the last dimension, times a gain")
        return gain

    def _name_of_gain(self, gain: Tensor) -> tuple[str | None, float]:
        for name, parameter in self.module.named_parameters(recurse=False):
            for offset in (0.0, 1.0):
                if self._close(gain, parameter.detach() + offset):
                    return name, offset
        if self._close(gain, torch.ones_like(gain)):
            return None, 0.0
        raise RefusedError("its gain is neither a parameter, nor one plus a parameter, nor 1")

    def _name_of_bias(self, bias: Tensor) -> str | None:
        for name, parameter in self.module.named_parameters(recurse=False):
            if self._close(bias, parameter.detach()):
                return name
        if float(bias.abs().max()) <= _CLOSE:
            return None
        raise RefusedError("its bias is not a parameter")

    def _eps(self, x: Tensor, gain: Tensor, bias: Tensor, centered: bool) -> float | None:
        """Return ε, measured at rows whose mean square is near it and checked at four sizes."""
        row = x.flatten(0, -2)[:1]
        row = row - row.mean() if centered else row
        row = row / row.square().mean().sqrt()
        measured: list[tuple[float, float]] = []  # (mean square, 1/r²)
        for power in _LOG2_SCALES:
            small = row * 2.0**power
            odd = self.run(small.expand(*_ROWS, -1))[0, :1] - bias
            r = float((odd * gain * small).sum() / (gain * small).square().sum())
            if r > 0 and math.isfinite(r):
                measured.append((4.0**power, 1 / r**2))
        near = [(m, whole - m) for m, whole in measured if 0.05 * m < whole - m < 20 * m]
        if not near:
            return 0.0
        found = sorted(eps for _, eps in near)[len(near) // 2]
        if any(abs(m + found - whole) > 1e-3 * whole for m, whole in measured if m > 1e-3 * found):
            raise RefusedError("its ε is not added to the mean square under the root")
        return exact_eps(self.module, found)

    def _cast(self, found: Identity) -> str | None:
        """Return the order of rounding that a bfloat16 copy follows, or None."""
        module = copy.deepcopy(self.module).to(torch.bfloat16)
        x = torch.randn(64, self.width or _FREE_WIDTH, generator=self.generator).bfloat16() * 3
        with torch.no_grad():
            try:
                y = module(x)
            except Exception:  # a module without support for bfloat16
                return None
        if y.dtype != torch.bfloat16:
            return None
        for cast in CASTS if found.kind == "rmsnorm" else CASTS[:1]:
            if almost_equal(y, apply(found, module, x, cast)):
                return cast
        return None

    def _close(self, a: Tensor, b: Tensor, like: Tensor | None = None) -> bool:
        size = float((b if like is None else like).abs().max())
        return float((a - b).abs().max()) <= _CLOSE * max(size, 1e-30)


def apply(found: Identity, module: nn.Module, x: Tensor, cast: str) -> Tensor:
    """Return omninorm's norm of x with the module's parameters."""
    gain = None if found.gain is None else module.get_parameter(found.gain)
    if found.kind == "rmsnorm":
        return functional.rms_norm(x, gain, found.eps, gain_offset=found.gain_offset, cast=cast)
    bias = None if found.bias is None else module.get_parameter(found.bias)
    if found.gain_offset:
        return functional.layer_norm(x, None if gain is None else gain + found.gain_offset, bias, found.eps)
    return functional.layer_norm(x, gain, bias, found.eps)


def _width(module: nn.Module) -> int | None:
    """Return the size of a module's parameter vectors; None without parameters."""
    if any(True for _ in module.children()):
        raise RefusedError("it contains other modules")
    parameters = list(module.parameters())
    for parameter in parameters:
        if is_lazy(parameter) or parameter.is_meta:
            raise RefusedError("its parameters have no values yet")
        if not parameter.is_floating_point():
            raise RefusedError(f"its parameters are {parameter.dtype}, so it is quantized")
    sizes = {tuple(parameter.shape) for parameter in parameters}
    if not sizes:
        shape = getattr(module, "normalized_shape", None)
        return int(shape[0]) if isinstance(shape, tuple) and len(shape) == 1 else None
    if len(sizes) > 1 or len(next(iter(sizes))) != 1 or next(iter(sizes))[0] < 2:
        raise RefusedError("its parameters are not vectors of one size")
    return int(next(iter(sizes))[0])


def exact_eps(module: nn.Module, found: float) -> float | None:
    """Return the exact ε near the measured one: an attribute of the module or a number of three digits.

    None means the machine epsilon of the compute dtype.

    Raises:
        RefusedError: none of these is close enough.
    """
    known = [value for value in vars(module).values() if isinstance(value, float)]
    if abs(found - torch.finfo(torch.float64).eps) < _EPS_CLOSE * found and found not in known:
        return None
    for value in [*known, float(f"{found:.2e}")]:
        if abs(value - found) <= _EPS_CLOSE * found:
            return value
    raise RefusedError(f"its ε, about {found:.6g}, cannot be determined exactly")


def normalize(x: Tensor, centered: bool) -> Tensor:
    """Return x̂ in float64, without ε."""
    if centered:
        x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt()


def almost_equal(a: Tensor, b: Tensor) -> bool:
    """Return whether bfloat16 values are equal except for at most one in a hundred.

    The other order of rounding would change a quarter of them. The exceptions may differ by two units in the last
    place: if the statistics differ in their last bit, x̂ may be rounded the other way, which changes its product with
    the gain by up to two units.
    """
    steps = (_ordered(a) - _ordered(b)).abs()
    return int(steps.max()) <= 2 and float((steps > 0).float().mean()) <= 0.01


def _ordered(values: Tensor) -> Tensor:
    """Map bfloat16 values to integers in the same order; neighboring values differ by one."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _forget_hooks(module: nn.Module) -> None:
    for hooks in _hooks(module):
        hooks.clear()


def _hooks(module: nn.Module) -> Iterator[dict[int, object]]:
    """Yield the dictionaries of a module's hooks."""
    for name, value in vars(module).items():
        if name.endswith("hooks") and isinstance(value, dict):
            yield value
