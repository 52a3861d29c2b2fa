"""An accelerator without hardware: the device "simgpu", for tests of device handling on a CPU.

Its tensors are wrappers around CPU tensors, and its operators run on the CPU. It shows operations that a GPU would
refuse, or that would be slow on it:

- tensors of two devices in one operator raise an error, as on CUDA;
- `counts.waits` counts operations that make the host wait for the device: `.item()`, copies to the host, blocking
  copies to the device;
- `counts.launches` counts operator calls, which are similar to kernel launches.

Call `install()` once per process, and `to_simulated(model)` to move a model. The device occupies PyTorch's slot for
out-of-tree back ends (PrivateUse1), so tests that use it run in a separate process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "simgpu"
aten = torch.ops.aten
# Operators that only return another view of a tensor: on a GPU they launch no kernel.
_VIEWS = {
    "view", "_unsafe_view", "expand", "slice", "select", "transpose", "t", "permute", "unsqueeze", "squeeze", "alias",
    "detach", "split", "split_with_sizes", "unbind", "as_strided", "unfold", "diagonal", "_reshape_alias", "chunk",
    "movedim", "empty", "empty_strided", "empty_like", "lift_fresh",
}  # fmt: skip


@dataclass
class Counts:
    """Counts of the operators that have run on the device, and of the operations for which the host waited, by name."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.launches.clear()
        self.waits.clear()


counts = Counts()
_library: torch.library.Library | None = None
_autocast: torch.library.Library | None = None
_AUTOCAST = "AutocastPrivateUse1"


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class SimulatedTensor(Tensor):
    """A tensor on the simulated device; `raw` is the CPU tensor that holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> SimulatedTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def tolist(self) -> Any:
        counts.waits["copy to host"] += 1
        return self.raw.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _unwrap(value: Any) -> Any:
    return value.raw if isinstance(value, SimulatedTensor) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operator on the raw values, and count it."""
    name = func.overloadpacket.__name__
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if func is aten._local_scalar_dense.default:
        counts.waits["item"] += 1
        return func(args[0].raw)
    if func is aten._to_copy.default and target not in (None, NAME):
        counts.waits["copy to host"] += not kwargs.get("non_blocking", False)
        return func(args[0].raw, **{**kwargs, "non_blocking": False})
    if func is aten.copy_.default and not isinstance(args[0], SimulatedTensor):
        counts.waits["copy to host"] += 1
        return func(args[0], args[1].raw)
    _check_devices(func, args, kwargs)
    if func is aten.copy_.default and not isinstance(args[1], SimulatedTensor):
        is_async = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
        counts.waits["blocking copy to device"] += not is_async
    if name not in _VIEWS:
        counts.launches[name] += 1
    if target is not None:
        kwargs = {**kwargs, "device": "cpu"}
    out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    return _wrap(func, args, kwargs, out)


def _wrap(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """Return the output in wrappers: those of the arguments that were mutated, and new ones for everything else."""
    known = {id(part.raw): part for part in tree_flatten((args, kwargs))[0] if isinstance(part, SimulatedTensor)}

    def wrap(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        return known[id(part)] if id(part) in known else SimulatedTensor(part)

    return tree_map(wrap, out)


def _check_devices(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError if a CPU tensor is used with the device's, except for a scalar or the source of a copy."""
    if func is aten.copy_.default:
        return
    parts = tree_flatten((args, kwargs))[0]
    foreign = [part for part in parts if isinstance(part, Tensor) and not isinstance(part, SimulatedTensor)]
    for part in foreign:
        if part.ndim > 0 and part.numel() > 0:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu in {func}")


def _empty(size: Any, **options: Any) -> Tensor:
    options = {name: options[name] for name in ("dtype", "layout", "memory_format") if options.get(name) is not None}
    return SimulatedTensor(torch.empty(size, **options, device="cpu"))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _arange(*limits: Any, dtype: Any = None, **_: Any) -> Tensor:
    """Return torch.arange's result, whose own implementation would resize a wrapper of no elements."""
    counts.launches["arange"] += 1
    return SimulatedTensor(torch.arange(*limits, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy where PyTorch calls the back end directly, as `torch.tensor(values, device=…)` does."""
    if not isinstance(source, SimulatedTensor):
        counts.waits["blocking copy to device"] += not non_blocking
        counts.launches["copy_"] += 1
    elif not isinstance(target, SimulatedTensor):
        counts.waits["copy to host"] += not non_blocking
    _unwrap(target).copy_(_unwrap(source))
    return target


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer in autocast's dtype; other operators keep the dtypes of their inputs."""
    dtype = torch.get_autocast_dtype(NAME)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _AUTOCAST))):
        bias = None if bias is None else bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)


def install() -> None:
    """Register the device. A second call does nothing."""
    global _library, _autocast
    if _library is None:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
        _library = torch.library.Library("aten", "IMPL")
        _library.impl("empty.memory_format", _empty, "PrivateUse1")
        _library.impl("empty_strided", _empty_strided, "PrivateUse1")
        _library.impl("_copy_from", _copy_from, "PrivateUse1")
        _library.impl("linear", _linear, _AUTOCAST)
        _autocast = torch.library.Library("_", "IMPL", _AUTOCAST)
        _autocast.fallback(torch.library.fallthrough_kernel)
        for overload in ("arange", "arange.start", "arange.start_step"):
            _library.impl(overload, _arange, "PrivateUse1")
        # Conversions such as `module.double()` would change the dtype of a tensor that wraps another, but not that one's.
        torch.__future__.set_overwrite_module_params_on_conversion(True)


def to_simulated(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers to the device, in place. Return the module."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = SimulatedTensor(parameter.detach().clone())
                part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = SimulatedTensor(buffer.detach().clone())
    return module


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what runs inside the block; yields the counts, which are complete at its end."""
    before = Counts(counts.launches.copy(), counts.waits.copy())
    found = Counts()
    yield found
    found.launches.update(counts.launches - before.launches)
    found.waits.update(counts.waits - before.waits)
