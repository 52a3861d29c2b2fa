"""Recognizes norms of any class by probing a copy, so that their inputs can be measured.

`identify` describes norms that can be replaced, and refuses everything else. `recognize` answers an easier question:
does the module divide each row by the row's size, and over which dimension? So it also recognizes norms over channels
or over groups of features, with a gate, with one gain for all features, and with an ε that is not under the root.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from omninorm import functional
from omninorm.layers.identify import RefusedError, exact_eps, normalize

_ROWS = 6
_FREE_WIDTH = 64  # the width at which a norm that takes any width is probed
# Attributes of a module with more objects, or larger tensors, are not copied.
_MOST_OBJECTS = 10_000
_MOST_NUMBERS = 2**20
_CLOSE = 1e-5  # modules that compute in float32 internally are accurate to about 1e-6 of the largest output
_EXPONENTS = range(0, -80, -1)
GATES = ("gate", "z", "g")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {**functional.ACTIVATIONS, "identity": lambda gate: gate}


@dataclass(frozen=True)
class Form:
    """The form of a norm.

    Args:
        centered: whether it subtracts the mean.
        axis: the dimension of the features: −1, or 1 for channels first.
        dims: the number of trailing dimensions that are normalized together.
        groups: the number of groups of features; each group is normalized separately.
        gain: the name of the parameter of which the gain is a linear function, or None.
        offset: the number that is added to this parameter to get the gain, up to a constant factor.
        bias: the name of the parameter that is added to the output, or None.
        eps: ε, added to the mean square or the variance; None if it is unknown or added elsewhere.
        gate: the effect of a second argument: "silu", "sigmoid" or "identity" if this function of it multiplies the
            input before the norm, "after" if it multiplies the output, "unknown" for anything else; None without one.
    """

    centered: bool
    axis: int = -1
    dims: int = 1
    groups: int = 1
    gain: str | None = None
    offset: float = 0.0
    bias: str | None = None
    eps: float | None = None
    gate: str | None = None


def recognize(module: nn.Module) -> Form | None:
    """Return the form of a norm, or None if the module does not normalize features. The module itself is not called.

    Raises:
        RefusedError: its copy cannot be called on the CPU with one tensor.

    Example:
        >>> form = recognize(nn.LayerNorm(8))
        >>> form.centered, form.axis, form.gain, form.bias
        (True, -1, 'weight', 'bias')
        >>> recognize(nn.Linear(8, 8)) is None
        True
    """
    with _kept_random_states():
        return _recognize(module)


def _recognize(module: nn.Module) -> Form | None:
    called = False
    for layout in _LAYOUTS:
        try:
            with torch.device("cpu"), torch.autocast("cpu", enabled=False):
                return _Probe(module, *layout).form()
        except RefusedError:
            called = True
        except Exception:  # a module may raise anything, which means that it cannot be called this way
            continue
    if not called:
        raise RefusedError("it cannot be called on the CPU with a single tensor")
    return None


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """Restore the states of the random generators at the end, because probing must not change the training."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]
    numpy = sys.modules.get("numpy")
    state, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def unwatched_copy(module: nn.Module) -> nn.Module:
    """Return a float64 copy on the CPU without hooks, which shares no object with the module.

    Its parameters have the module's shapes, but no values yet.

    Raises:
        TypeError: an attribute cannot be copied, or holds other modules.
    """
    memo = {id(each): object.__new__(type(each)) for each in module.modules()}
    for each in module.modules():
        _fill(memo[id(each)], each, memo)
    new: nn.Module = memo[id(module)]
    return new


def _fill(new: nn.Module, module: nn.Module, memo: dict[int, Any]) -> None:
    """Set the attributes of a copy. `memo` holds the copies by the ids of the originals, as for copy.deepcopy."""
    for name, value in vars(module).items():
        if name.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called")) and isinstance(value, dict):
            value = type(value)()
        elif name == "_parameters":
            value = {key: None if each is None else _drawn(each) for key, each in value.items()}
        elif name == "_buffers":
            value = {key: None if each is None else _moved(each) for key, each in value.items()}
        elif name == "_modules":
            value = {key: None if each is None else memo[id(each)] for key, each in value.items()}
        elif isinstance(value, Tensor):
            value = _moved(value)
        elif name != "forward":
            _check_copyable(value, memo)
            value = copy.deepcopy(value, memo)
        if name != "forward":  # a replaced forward is bound to the original
            new.__dict__[name] = value
    new.__dict__["training"] = False


def _check_copyable(value: Any, memo: dict[int, Any]) -> None:
    """Raise TypeError if a value holds other modules or much data, such as a reference to the whole model."""
    waiting, seen = [value], set(memo)
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (type, ModuleType, FunctionType, str, bytes, int, float)):
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module) or len(seen) > _MOST_OBJECTS:
            raise TypeError(f"{type(each).__name__} is not copied")
        if isinstance(each, Tensor):
            if each.numel() > _MOST_NUMBERS:
                raise TypeError("a large tensor is not copied")
        elif isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset)):
            waiting += each
        elif isinstance(each, MethodType):
            waiting.append(each.__self__)
        else:
            waiting += getattr(each, "__dict__", {}).values()


def _drawn(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=torch.float64, device="cpu"), requires_grad=False)


def _moved(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("cpu", copy=True)
    return moved.double() if moved.is_floating_point() else moved


# A layout is the axis of the features, a function that arranges rows (rows, width) as the module's input, and one that
# reads rows from its output. In order: features last, channels first in 4-D, channels first in 3-D.
Layout = tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
_LAYOUTS: tuple[Layout, ...] = (
    (-1, lambda x: torch.unflatten(x, 0, (2, -1)), lambda y: y.flatten(0, 1)),
    (1, lambda x: torch.unflatten(x, 0, (1, 2, -1)).movedim(-1, 1), lambda y: y.movedim(1, -1).flatten(0, 2)),
    (1, lambda x: torch.unflatten(x, 0, (2, -1)).movedim(-1, 1), lambda y: y.movedim(1, -1).flatten(0, 1)),
)


class _Probe:
    """A copy of a module that can be called with rows (rows, width) in float64."""

    def __init__(
        self, module: nn.Module, axis: int, arrange: Callable[[Tensor], Tensor], restore: Callable[[Tensor], Tensor]
    ) -> None:
        self.axis, self.arrange, self.restore = axis, arrange, restore
        self.width, self.shape = _width(module)
        self.module = unwatched_copy(module)
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.gate: Tensor | None = None
        self.gate_name = gate_of(module)
        self.centered, self.groups = False, 1
        self._draw()

    def form(self) -> Form:
        x = self._random(_ROWS)
        large = x * 2.0**15
        if self.gate_name is not None and not self._runs_without_gate(large):
            self.gate = torch.ones(1, self.width, dtype=torch.float64)
        y = self.run(large)
        if not bool(y.isfinite().all()) or float(y.abs().max()) == 0.0:
            raise RefusedError("its outputs are not finite, or all 0")
        if not self._close(self.run(large * 2.0**10), y):
            raise RefusedError("its output grows with its input")
        bias = self._bias(large, y)
        self.centered = self._close(self.run(large + 2.0**17), y)
        self.groups = self._groups(large, y)
        name, offset = self._name_of_gain(large, self._gain(large, y - bias))
        gate = self._kind_of_gate(x)
        return Form(
            centered=self.centered,
            axis=self.axis,
            dims=len(self.shape),
            groups=self.groups,
            gain=name,
            offset=offset,
            bias=self._name_of_bias(large),
            eps=self._eps(x, gate),
            gate=gate,
        )

    def _runs_without_gate(self, x: Tensor) -> bool:
        """Whether the gate can be left out. A gate with the default None may be needed all the same."""
        if _is_required(self.module, str(self.gate_name)):
            return False
        try:
            self.run(x)
        except Exception:  # a module may raise anything
            return False
        return True

    def run(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return the output for rows x (rows, width)."""
        gate = self.gate if gate is None else gate
        inputs = self._arranged(x)
        gates = {} if gate is None else {str(self.gate_name): self._arranged(gate.expand_as(x))}
        with torch.no_grad():
            y = self.module(inputs, **gates)
        if not isinstance(y, Tensor) or y.shape != inputs.shape or not y.is_floating_point():
            raise RefusedError("it does not return a tensor of its input's shape")
        return self.restore(y.flatten(-len(self.shape))).double()

    def _arranged(self, x: Tensor) -> Tensor:
        x = self.arrange(x.clone())
        return torch.unflatten(x, -1, self.shape) if len(self.shape) > 1 else x  # the gain has a dimension for heads

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.width, generator=self.generator, dtype=torch.float64) + 0.3

    def _draw(self) -> None:
        for parameter in self.module.parameters():
            drawn = torch.rand(parameter.shape, generator=self.generator, dtype=torch.float64)
            parameter.data = drawn + 0.5

    def _bias(self, x: Tensor, y: Tensor) -> Tensor:
        even = (y + self.run(-x)) / 2
        if not self._close(even, even[:1].expand_as(even), like=y):
            raise RefusedError("f(−x) is not −f(x) plus a constant bias")
        return even.mean(0)

    def _groups(self, x: Tensor, y: Tensor) -> int:
        """Return the number of groups; those outputs form one that change with the first feature of the first row."""
        other = x.clone()
        other[0, 0] *= 3.0
        changed = (self.run(other) - y).abs() > 1e-9 * y.abs().max()
        if bool(changed[1:].any()):
            raise RefusedError("a row's output depends on other rows")
        count = int(changed[0].sum())
        if count == 0 or self.width % count or not bool(changed[0, :count].all()):
            raise RefusedError("it does not normalize contiguous groups of features")
        return self.width // count

    def _normed(self, x: Tensor) -> Tensor:
        return normalize(torch.unflatten(x, -1, (self.groups, -1)), self.centered).flatten(-2)

    def _gain(self, x: Tensor, odd: Tensor) -> Tensor:
        normed = self._normed(x)
        gain = (odd * normed).sum(0) / normed.square().sum(0)
        if not self._close(gain * normed, odd):
            raise RefusedError("it is neither RMSNorm nor LayerNorm times a gain")
        return gain

    def _name_of_gain(self, x: Tensor, gain: Tensor) -> tuple[str | None, float]:
        """Draw new parameters; return the name of the one of which the gain is a linear function, and its offset."""
        first = {name: each.detach().clone().flatten() for name, each in self.module.named_parameters(recurse=False)}
        self._draw()
        y = self.run(x)
        second = self._gain(x, y - self._bias(x, y))
        for name, before in first.items():
            if before.numel() not in (1, self.width):
                continue
            factor = (second - gain) / (self.module.get_parameter(name).detach().flatten() - before)
            offset = gain / factor - before
            if _constant(factor) and _constant(offset):
                return name, round(float(offset.mean()), 3) + 0.0
        return None, 0.0

    def _name_of_bias(self, x: Tensor) -> str | None:
        bias = self._bias(x, self.run(x))
        if float(bias.abs().max()) <= _CLOSE:
            return None
        for name, each in self.module.named_parameters(recurse=False):
            if each.numel() == self.width and self._close(bias, each.detach().flatten()):
                return name
        raise RefusedError("its bias is not a parameter")

    def _eps(self, x: Tensor, gate: str | None) -> float | None:
        """Return ε, measured at rows whose mean square is near it; None unless it is added to the mean square."""
        large = x * 2.0**15
        y = self.run(large)
        gain = self._gain(large, y - self._bias(large, y))
        row = self._normed(x[:1])
        small = row * torch.tensor([2.0**power for power in _EXPONENTS], dtype=torch.float64).unsqueeze(-1)
        odd = (self.run(small) - self.run(-small)) / 2
        r = (odd * gain * small).sum(-1) / (gain * small).square().sum(-1)
        measured: list[tuple[float, float]] = [
            (4.0**power, 1 / each**2) for power, each in zip(_EXPONENTS, r.tolist(), strict=True) if each > 0
        ]
        near = sorted(whole - m for m, whole in measured if 0.05 * m < whole - m < 20 * m)
        if not near:
            return 0.0 if len(measured) > len(_EXPONENTS) // 2 else None
        found = near[len(near) // 2]
        if any(abs(m + found - whole) > 1e-3 * whole for m, whole in measured if m > 1e-3 * found):
            return None
        if self.gate is not None and gate in ACTIVATIONS:  # the rows were multiplied by the gate's activation
            found *= float(ACTIVATIONS[gate](torch.ones(()))) ** 2
        try:
            eps = exact_eps(self.module, found)
        except RefusedError:
            return found
        return torch.finfo(torch.float32).eps if eps is None else eps

    def _kind_of_gate(self, x: Tensor) -> str | None:
        if self.gate_name is None:
            return None
        x, gate = x * 2.0**10, self._random(1)
        y = self.run(x, gate)
        for name, activate in {"after": torch.ones_like, **ACTIVATIONS}.items():
            gain = y / self._normed(x * activate(gate))
            if self._close(gain, gain[:1].expand_as(gain)):
                return name
        return "unknown"

    def _close(self, a: Tensor, b: Tensor, like: Tensor | None = None) -> bool:
        size = float((b if like is None else like).abs().max())
        return float((a - b).abs().max()) <= _CLOSE * max(size, 1e-30)


def _constant(values: Tensor) -> bool:
    middle = float(values.mean())
    return math.isfinite(middle) and float((values - middle).abs().max()) <= 1e-3 * max(abs(middle), 1.0)


def gate_of(module: nn.Module) -> str | None:
    """Return the name of the argument of a norm's forward that is its gate, or None."""
    return next((each.name for each in _arguments(module)[1:] if each.name in GATES), None)


def place_of(module: nn.Module, name: str) -> int:
    """Return the position of an argument of a module's forward."""
    return [each.name for each in _arguments(module)].index(name)


def _is_required(module: nn.Module, name: str) -> bool:
    return any(each.name == name and each.default is each.empty for each in _arguments(module))


def _arguments(module: nn.Module) -> list[inspect.Parameter]:
    """Return the arguments of a module's forward, without self."""
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


def _width(module: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Return the number of features, and the shape of the gain without dimensions of size 1."""
    parameters = list(module.parameters())
    if any(is_lazy(parameter) or not parameter.is_floating_point() for parameter in parameters):
        raise RefusedError("its parameters have no values yet, or are quantized")
    shapes = {tuple(size for size in parameter.shape if size > 1) for parameter in parameters} - {()}
    if not shapes:
        given = getattr(module, "normalized_shape", None)
        width = int(given[0]) if isinstance(given, (tuple, list)) and len(given) == 1 else _FREE_WIDTH
        return width, (width,)
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) > 2:
        raise RefusedError("its parameters are not vectors of one size")
    return math.prod(shape), shape
