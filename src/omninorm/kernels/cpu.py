"""The CPU back end: the C++ operators of csrc/, their fake kernels, and their derivatives.

The library is one shared object beside this file, built on installation. Where it is missing, `unavailable()` says why
and the reference computes in its place. Inside it, the arithmetic exists once per instruction set; the best that
the processor has is used, or the one that the environment variable OMNINORM_CPU names.

Backward keeps x and r = 1/√(mean square + ε), one number a row; LayerNorm keeps the mean too. The second derivative is
the reference's, whose backward functions are made of differentiable operations.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from omninorm.errors import ConfigError
from omninorm.kernels import reference

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "_cpu.so"
# Written by the installation in place of the library: the reason, in one line.
NOTE = FOLDER / "_cpu_missing.txt"


# The library -----------------------------------------------------------------------------------------------------


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    if not LIBRARY.exists():
        return None, NOTE.read_text(encoding="utf-8").strip() if NOTE.exists() else "they have not been built"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
        return _declared(ctypes.CDLL(str(LIBRARY))), ""
    except OSError as error:
        return None, f"the library does not load: {error}"


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.omninorm_runnable_set.argtypes = [ctypes.c_int]
    library.omninorm_runnable_set.restype = ctypes.c_char_p
    library.omninorm_current_set.restype = ctypes.c_char_p
    library.omninorm_use_set.argtypes = [ctypes.c_char_p]
    return library


_library, _reason = _load()
_operators: Any = torch.ops.omninorm
# Looked up once: a norm of one row costs about as much as finding its operator.
_rms_norm: Any = None if _library is None else _operators.rms_norm.default._op
_layer_norm: Any = None if _library is None else _operators.layer_norm.default._op


def unavailable() -> str:
    """Why the operators can't be used here; empty if they can."""
    return _reason


def instruction_sets() -> list[str]:
    """The instruction sets that were built and that this processor has, best first."""
    names: list[str] = []
    while _library is not None and (name := _library.omninorm_runnable_set(len(names))) is not None:
        names.append(name.decode())
    return names


def instruction_set() -> str:
    """The instruction set whose kernels run."""
    name: bytes = b"" if _library is None else _library.omninorm_current_set()
    return name.decode()


def use_instruction_set(name: str) -> None:
    """Makes every later call run the kernels of this instruction set.

    Raises:
        ConfigError: it was not built, or the processor lacks it.
    """
    if _library is None or not _library.omninorm_use_set(name.encode()):
        remedy = f"choose one of {', '.join(instruction_sets())}" if _library is not None else _reason
        raise ConfigError("OMNINORM_CPU must name an instruction set that can run here", repr(name), remedy)


if _library is not None and (_wish := os.environ.get("OMNINORM_CPU")):
    use_instruction_set(_wish)


# The norms -------------------------------------------------------------------------------------------------------


# What eps=None means: the machine epsilon of the compute dtype. Another dtype is refused with a KeyError.
MACHINE_EPS = {
    dtype: torch.finfo(reference.compute_dtype(dtype)).eps
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
# Llama's order rounds x̂ before the gain; any other name is refused with a KeyError.
ROUND_FIRST = {"fp32": False, "llama": True}


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str, *, traced: bool = False
) -> Tensor:
    """As `reference.rms_norm_forward`; the operator raises RuntimeError for what does not fit together.

    `traced` says that torch.compile is looking, which must see the operator itself.
    """
    if eps.__class__ is not float:
        eps = _eps(eps, x)
    round_first = ROUND_FIRST[cast]
    y: Tensor
    if torch.is_grad_enabled() and (x.requires_grad or _learns(weight)):
        y = RMSNormFunction.apply(x, weight, eps, gain_offset, round_first)  # type: ignore[no-untyped-call]
    elif traced:
        y = _operators.rms_norm.default(x, weight, eps, gain_offset, round_first)
    elif gain_offset == 0 and not round_first:
        y = _rms_norm(x, weight, eps)  # each further argument costs as much as normalizing a thousand numbers
    else:
        y = _rms_norm(x, weight, eps, gain_offset, round_first)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and x + residual."""
    constants = eps if eps.__class__ is float else _eps(eps, x), gain_offset, ROUND_FIRST[cast]
    pair: tuple[Tensor, Tensor]
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or _learns(weight)):
        pair = AddRMSNormFunction.apply(x, residual, weight, *constants)  # type: ignore[no-untyped-call]
    else:
        pair = _operators.add_rms_norm.default(x, residual, weight, *constants)
    return pair


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, *, traced: bool = False
) -> Tensor:
    """As `reference.layer_norm_forward`."""
    eps = eps if eps.__class__ is float else _eps(eps, x)
    y: Tensor
    if torch.is_grad_enabled() and (x.requires_grad or _learns(weight) or _learns(bias)):
        y = LayerNormFunction.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    elif traced:
        y = _operators.layer_norm.default(x, weight, bias, eps)
    else:
        y = _layer_norm(x, weight, bias, eps)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and x + residual."""
    eps = eps if eps.__class__ is float else _eps(eps, x)
    pair: tuple[Tensor, Tensor]
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or _learns(weight) or _learns(bias)):
        pair = AddLayerNormFunction.apply(x, residual, weight, bias, eps)  # type: ignore[no-untyped-call]
    else:
        pair = _operators.add_layer_norm.default(x, residual, weight, bias, eps)
    return pair


def _learns(gain: Tensor | None) -> bool:
    return gain is not None and gain.requires_grad


def _eps(eps: float | None, x: Tensor) -> float:
    """ε where it is no float: None, or an integer, which `functional` has checked."""
    return MACHINE_EPS[x.dtype] if eps is None else float(eps)


# Derivatives. The functions have no setup_context, which would cost more than the operator itself; under torch.func,
# which needs one, the reference computes.


class RMSNormFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, gain_offset: float, round_first: bool
    ) -> Tensor:
        y, scale = _operators.rms_norm_forward.default(x, weight, eps, gain_offset, round_first)
        ctx.save_for_backward(x, weight, scale)
        ctx.constants = eps, gain_offset, round_first
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        eps, gain_offset, round_first = ctx.constants
        wanted = ctx.needs_input_grad[1]
        dx, dweight = rms_norm_backward(dy, None, x, scale, weight, eps, gain_offset, round_first, wanted)
        return dx, dweight, None, None, None


class AddRMSNormFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        gain_offset: float,
        round_first: bool,
    ) -> tuple[Tensor, Tensor]:
        y, total, scale = _operators.add_rms_norm_forward.default(x, residual, weight, eps, gain_offset, round_first)
        ctx.save_for_backward(total, weight, scale)
        ctx.constants = eps, gain_offset, round_first
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):  # only gains learn
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal, None, None, None, None
        eps, gain_offset, round_first = ctx.constants
        wanted = ctx.needs_input_grad[2]
        dx, dweight = rms_norm_backward(dy, dtotal, total, scale, weight, eps, gain_offset, round_first, wanted)
        return dx, dx, dweight, None, None, None


class LayerNormFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, scale = _operators.layer_norm_forward.default(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        ctx.eps = eps
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, weight, bias = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[1:3])
        dx, dweight, dbias = layer_norm_backward(dy, None, x, mean, scale, weight, bias, ctx.eps, wanted)
        return dx, dweight, dbias, None


class AddLayerNormFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, scale = _operators.add_layer_norm_forward.default(x, residual, weight, bias, eps)
        ctx.save_for_backward(total, mean, scale, weight, bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):  # only gains learn
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dtotal, dtotal, None, None, None
        total, mean, scale, weight, bias = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[2:4])
        dx, dweight, dbias = layer_norm_backward(dy, dtotal, total, mean, scale, weight, bias, ctx.eps, wanted)
        return dx, dx, dweight, dbias, None


def rms_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    eps: float,
    gain_offset: float,
    round_first: bool,
    gains_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx + dtotal and dγ; differentiable where a second derivative is wanted."""
    if torch.is_grad_enabled():
        cast = "llama" if round_first else "fp32"
        dx, dweight = reference.rms_norm_backward(dy, x, weight, eps, gain_offset, cast)
        return dx if dtotal is None else dx + dtotal, dweight
    dx, dweight = _operators.rms_norm_backward.default(
        dy, dtotal, x, scale, weight, eps, gain_offset, round_first, gains_wanted
    )
    return dx, dweight if gains_wanted else None


def layer_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gains_wanted: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx + dtotal, dγ and dβ; differentiable where a second derivative is wanted."""
    if torch.is_grad_enabled():
        dx, dweight, dbias = reference.layer_norm_backward(dy, x, weight, bias, eps)
        return dx if dtotal is None else dx + dtotal, dweight, dbias
    dx, dweight, dbias = _operators.layer_norm_backward.default(
        dy, dtotal, x, mean, scale, weight, bias, eps, gains_wanted
    )
    dweight = dweight if gains_wanted and weight is not None else None
    return dx, dweight, dbias if gains_wanted and bias is not None else None


# Meta kernels: shapes and dtypes without values, for torch.compile, torch.export and meta tensors -----------------


def _like(x: Tensor) -> Tensor:
    if not x.is_meta:  # a gain on the meta device brought us here
        raise RuntimeError("omninorm: x and the gain must be on one device")
    return x.new_empty(x.shape)


def _one_per_row(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1],), dtype=reference.compute_dtype(x.dtype))


def _gradient(gain: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    if gain is None:
        return x.new_empty((0,), dtype=torch.float32)
    return gain.new_empty((x.shape[-1] if wanted else 0,))


def _meta_rms_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    eps: float,
    gain_offset: float = 0.0,
    round_first: bool = False,
    gains_wanted: bool = True,
) -> tuple[Tensor, Tensor]:
    return _like(x), _gradient(weight, x, gains_wanted)


def _meta_layer_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gains_wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _gradient(weight, x, gains_wanted), _gradient(bias, x, gains_wanted)


META_KERNELS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, *_: _like(x),
    "rms_norm_forward": lambda x, *_: (_like(x), _one_per_row(x)),
    "add_rms_norm": lambda x, *_: (_like(x), _like(x)),
    "add_rms_norm_forward": lambda x, *_: (_like(x), _like(x), _one_per_row(x)),
    "rms_norm_backward": _meta_rms_norm_backward,
    "layer_norm": lambda x, *_: _like(x),
    "layer_norm_forward": lambda x, *_: (_like(x), _one_per_row(x), _one_per_row(x)),
    "add_layer_norm": lambda x, *_: (_like(x), _like(x)),
    "add_layer_norm_forward": lambda x, *_: (_like(x), _like(x), _one_per_row(x), _one_per_row(x)),
    "layer_norm_backward": _meta_layer_norm_backward,
}
if _library is not None:
    _meta: Any = torch.library.Library("omninorm", "IMPL", "Meta")  # type: ignore[no-untyped-call]
    for _name, _kernel in META_KERNELS.items():
        _meta.impl(_name, _kernel)
