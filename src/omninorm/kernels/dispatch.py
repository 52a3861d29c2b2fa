"""Back-end selection.

A back end is a module of this folder:

- `reference` computes any tensor in plain PyTorch.
- `cpu` computes plain CPU tensors with C++ operators, if they were built.
- `fused` uses PyTorch's norm operators.
- `gpu` computes tensors on a GPU with Triton, if it is installed.

This module chooses one, so that callers never have to name it. On GPUs, `measured` chooses among the back ends that
fulfill the numerics contract for the arguments.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting

from omninorm.config import LARGEST
from omninorm.errors import ConfigError, InputError
from omninorm.kernels import autograd, cpu, distributed, fused, gpu, measured, operators, reference

# Classes that the operators accept. Other subclasses of Tensor may override PyTorch's functions; the reference calls
# these functions, so it is used for them.
PLAIN = (Tensor, torch.nn.Parameter)
TRACED = (*PLAIN, FakeTensor)  # torch.export passes fake tensors when it runs without Dynamo
CPU_RUNS = not cpu.unavailable()

# The back ends that the open `use_backend` blocks of all threads request, and the latest of them. If there is none,
# `_forced` is None, and this module chooses.
_demands: dict[object, str] = {}
_forced: str | None = None
_lock = threading.Lock()


class Backend(NamedTuple):
    """A back end: its name, whether it is available on this machine, and a description or the reason why not."""

    name: str
    available: bool
    reason: str


def backends() -> list[Backend]:
    """Return all back ends, each with a description, or with the reason if it is unavailable on this machine.

    On a GPU, `measured.json` decides between the first two. `backend_for` explains the choice for a tensor.

    Example:
        >>> [backend.name for backend in backends()]
        ['torch', 'triton', 'cpu', 'reference']
    """
    sets = ", ".join(cpu.instruction_sets())
    how = (
        cpu.unavailable()
        or f"C++ for CPU tensors, with {cpu.instruction_set()} instructions (this processor supports {sets})"
    )
    where, why_not = gpu.device(), gpu.unavailable()
    gpu_how = why_not or (f"Triton, on {where}" if where else "PyTorch sees no GPU")
    return [
        Backend("torch", True, "PyTorch's norm operators, on every device; the default on GPUs"),
        Backend("triton", bool(where and not why_not), gpu_how),
        Backend("cpu", CPU_RUNS, how),
        Backend("reference", True, "plain PyTorch, on every device"),
    ]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute RMSNorm and LayerNorm with this back end inside the block, in all threads.

    A norm raises InputError if the back end can't compute it. If several blocks are open, the one entered last counts.

    Args:
        name: "torch", "triton", "cpu" or "reference".

    Raises:
        ConfigError: an unknown back end, or one that is unavailable on this machine.

    Example:
        >>> import omninorm
        >>> with omninorm.use_backend("reference"):
        ...     y = omninorm.functional.rms_norm(torch.ones(3))
    """
    known = {backend.name: backend for backend in backends()}
    if name not in known:
        raise ConfigError("The back end must be one of " + ", ".join(known), repr(name), "choose one of these")
    if not known[name].available:
        others = ", ".join(backend.name for backend in known.values() if backend.available)
        invariant = f"The back end {name!r} is not available on this machine ({known[name].reason.rstrip('.')})"
        raise ConfigError(invariant, "", f"choose one that is: {others}")
    block = object()
    _demand(block, name)
    try:
        with gpu.emulated() if name == "triton" and gpu.INTERPRETED else nullcontext():
            yield
    finally:
        _demand(block, None)


def _demand(block: object, name: str | None) -> None:
    """Store the back end that a block requests, or remove it if `name` is None.

    Blocks of several threads may end in any order.
    """
    global _forced
    with _lock:
        if name is None:
            del _demands[block]
        else:
            _demands[block] = name
        _forced = next(reversed(_demands.values()), None)


def is_plain_cpu(x: Any, gain: Any = None, bias: Any = None, eps: Any = None, gain_offset: Any = 0.0) -> bool:
    """Return whether the C++ operators can take these arguments directly; they check shapes, dtypes and ranges.

    This runs before every norm. It is one long expression because a function call takes as long as normalizing 1,000
    numbers.
    """
    return (
        CPU_RUNS
        and x.__class__ in PLAIN
        and x.is_cpu
        and (gain is None or gain.__class__ in PLAIN)
        and (bias is None or bias.__class__ in PLAIN)
        and (eps is None or eps.__class__ is float)
        and gain_offset.__class__ is float
        and (_forced is None or _forced == "cpu")
        and not is_dynamo_compiling()
        # only the reference supports function transforms and forward-mode differentiation
        and not are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_plain_gpu(
    operator: str, x: Any, gain: Any, bias: Any, eps: Any, gain_offset: Any = 0.0, cast: Any = "fp32"
) -> bool:
    """Return whether PyTorch's operators can take these arguments directly, with fewer checks than `is_by_torch`.

    It is one long expression, like `is_plain_cpu`: launching a kernel takes a few microseconds, a function call 0.1.
    """
    return (
        x.__class__ in PLAIN
        and (
            x.is_cuda
            if _forced is None
            else _forced == "torch" and (x.is_cuda or (x.is_cpu and x.dtype is torch.float32))
        )
        and x.dtype in fused.DTYPES
        and (gain is None or (gain.__class__ in PLAIN and gain.dtype is x.dtype))
        and (bias is None or (bias.__class__ in PLAIN and bias.dtype is x.dtype))
        and (eps is None or (eps.__class__ is float and 0.0 <= eps <= LARGEST))
        and gain_offset == 0.0
        and cast == "fp32"
        and not is_dynamo_compiling()
        and x.ndim > 0
        and 0 < x.numel() <= fused.MOST_ELEMENTS
        and not are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and (measured.ALWAYS_DEFAULT or _forced == "torch" or measured.choose(operator, x).backend == "torch")
    )


def is_by_torch(operator: str, x: Tensor, *gains: Tensor | None, gain_offset: float = 0.0, cast: str = "fp32") -> bool:
    """Return whether PyTorch's operators compute this norm: `measured` chooses them, or `use_backend` requests them.

    Raises:
        InputError: `use_backend` requests them, but they can't compute it.
    """
    if _forced is None:
        return _torch_choice(operator, x, *gains, gain_offset=gain_offset, cast=cast)[0]
    if _forced != "torch":
        return False
    lack = _torch_lacks(x, *gains, gain_offset=gain_offset, cast=cast)
    if lack:
        invariant = f"Back end 'torch' can't compute this norm with PyTorch's operators: {lack}"
        remedy = "call the norm outside use_backend, so that omninorm chooses a back end"
        raise InputError(invariant, f"{type(x).__name__} on {x.device}", remedy)
    return True


def _torch_lacks(x: Tensor, *gains: Tensor | None, gain_offset: float, cast: str) -> str:
    if are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "they are not used in torch.func and forward-mode differentiation"
    return fused.lacks(x, *gains, gain_offset=gain_offset, cast=cast, traced=is_compiling())


def _torch_choice(operator: str, x: Tensor, *gains: Tensor | None, gain_offset: float, cast: str) -> tuple[bool, str]:
    """Return whether the automatic choice for x is PyTorch's operators, and why."""
    if x.is_cpu or x.is_meta:
        return False, f"PyTorch's operators are the choice on GPUs only, and x is on {x.device}"
    lack = _torch_lacks(x, *gains, gain_offset=gain_offset, cast=cast)
    if lack:
        return False, f"not PyTorch's operators: {lack}"
    choice = measured.choose(operator, x, is_compiling())
    # The table may choose Triton because it was faster on such a GPU, although it is not available on this machine.
    return choice.backend == "torch" or bool(gpu.unavailable()), choice.reason


def backend_for(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    operator: str = "rms_norm",
    gain_offset: float = 0.0,
    cast: str = "fp32",
) -> Backend:
    """Return the back end that would compute a norm of these tensors, and the reason; the norm is not computed.

    Args:
        x, weight, bias, gain_offset, cast: as in `omninorm.functional`.
        operator: "rms_norm" or "layer_norm"; add_rms_norm and add_layer_norm use the same back ends.

    Raises:
        InputError: `use_backend` requests a back end that can't compute this norm.

    Example:
        >>> backend_for(torch.ones(2, 4, device="meta")).name
        'reference'
    """
    options: dict[str, Any] = {"gain_offset": gain_offset, "cast": cast}
    if is_by_torch(operator, x, weight, bias, **options):
        name = "torch"
    elif has_operators(x, weight, bias, operator=operator):
        name = "cpu" if x.is_cpu and not autograd.emulated else "triton"
    else:
        name = "reference"
    if _forced is not None:
        return Backend(name, True, f"use_backend({_forced!r})")
    return Backend(name, True, _torch_choice(operator, x, weight, bias, **options)[1])


def has_operators(x: Tensor, *others: Tensor | None, operator: str = "rms_norm") -> bool:
    """Return whether omninorm's operators compute a norm of these tensors.

    They compute plain tensors on the CPU or a GPU, and fake tensors while compiling.

    Raises:
        InputError: they don't, but `use_backend` requests a back end that consists of them.
    """
    classes = TRACED if is_compiling() else PLAIN
    suits = (
        all(tensor is None or tensor.__class__ in classes for tensor in (x, *others))
        and not are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
    device = x.device.type
    by_cpp = device == "cpu" and CPU_RUNS and _forced in (None, "cpu")
    by_triton = device == "cuda" and _forced in (None, "triton") and not _fuses(operator, x) and not gpu.unavailable()
    emulated = device == "cpu" and autograd.emulated and _forced == "triton"
    if suits and (by_cpp or by_triton or emulated):
        return True
    if _forced in ("cpu", "triton"):
        what = "plain CPU tensors" if _forced == "cpu" else "plain tensors on a GPU"
        invariant = f"Back end {_forced!r} only computes {what}, outside torch.func and forward-mode differentiation"
        remedy = "call the norm outside use_backend, so that omninorm chooses a back end"
        raise InputError(invariant, f"{type(x).__name__} on {x.device}", remedy)
    if _forced is None and not is_compiling():
        if device == "cpu" and not CPU_RUNS:
            _warn("CPU", "omninorm's C++ operators", cpu.unavailable())
        if device == "cuda" and gpu.unavailable():
            _warn("GPU", "Triton", gpu.unavailable())
    return False


def _fuses(operator: str, x: Tensor) -> bool:
    """Return whether the compiler should trace the formula, which it can fuse with other operations, not an operator.

    This is the case on GPUs, unless the operator was measured to be faster or `use_backend` requests it.
    """
    return is_compiling() and _forced is None and measured.choose(operator, x, compiled=True).backend != "triton"


def takes_the_formula() -> bool:
    """Return whether PyTorch must differentiate the reference's formula itself, without a torch.autograd.Function.

    This is the case in forward-mode differentiation and in exported programs, which can't contain such a function.
    """
    return forward_ad._current_level >= 0 or is_exporting()


@cache
def _warn(kind: str, what: str, why: str) -> None:
    warnings.warn(
        f"Norms of {kind} tensors are several times slower without {what}. {why[:1].upper()}{why[1:].rstrip('.')}.",
        stacklevel=2,
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str) -> Tensor:
    if distributed.is_distributed(x):
        return distributed.rms_norm(x, weight, eps, gain_offset, cast, on_rows=rms_norm)  # type: ignore[no-any-return]
    if is_by_torch("rms_norm", x, weight, gain_offset=gain_offset, cast=cast):
        return fused.rms_norm(x, weight, _eps(eps, x), gain_offset)
    if has_operators(x, weight):
        return operators.rms_norm(x, weight, eps, gain_offset, cast, traced=is_compiling())
    if takes_the_formula():
        return reference.rms_norm_forward(x, weight, eps, gain_offset, cast)
    y: Tensor = reference.RMSNormFunction.apply(x, weight, eps, gain_offset, cast)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str
) -> tuple[Tensor, Tensor]:
    if is_by_torch("rms_norm", x, weight, gain_offset=gain_offset, cast=cast):
        total = x + residual
        return fused.rms_norm(total, weight, _eps(eps, x), gain_offset), total
    if has_operators(x, residual, weight):
        return operators.add_rms_norm(x, residual, weight, eps, gain_offset, cast)
    total = x + residual
    return rms_norm(total, weight, eps, gain_offset, cast), total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Tensor:
    if distributed.is_distributed(x):
        return distributed.layer_norm(x, weight, bias, eps, on_rows=layer_norm)  # type: ignore[no-any-return]
    if is_by_torch("layer_norm", x, weight, bias):
        return fused.layer_norm(x, weight, bias, _eps(eps, x))
    if has_operators(x, weight, bias, operator="layer_norm"):
        return operators.layer_norm(x, weight, bias, eps, traced=is_compiling())
    if takes_the_formula():
        return reference.layer_norm_forward(x, weight, bias, eps)
    y: Tensor = reference.LayerNormFunction.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    if is_by_torch("layer_norm", x, weight, bias):
        total = x + residual
        return fused.layer_norm(total, weight, bias, _eps(eps, x)), total
    if has_operators(x, residual, weight, bias, operator="layer_norm"):
        return operators.add_layer_norm(x, residual, weight, bias, eps)
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def _eps(eps: float | None, x: Tensor) -> float:
    return float(reference.resolve_eps(eps, reference.compute_dtype(x.dtype)))
