"""omninorm's operators: their schemas, the functions that call them, and their meta kernels.

`cpu` implements them for plain CPU tensors and `gpu` for tensors on a GPU; `autograd` and `exported` contain their
derivatives. If the C++ library was built, it defines the schemas, otherwise this module does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling, is_exporting

from omninorm.kernels import cpu, exported, probe, reference
from omninorm.kernels.autograd import (
    AddLayerNormFunction,
    AddRMSNormFunction,
    LayerNormFunction,
    RMSNormFunction,
    rows_per_block,
)

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)

_RMS = "Tensor? weight, float eps, float gain_offset=0.0, bool round_first=False"
_LAYER = "Tensor? weight, Tensor? bias, float eps"
_RMS_BACKWARD = f"(Tensor dy, Tensor? dtotal, Tensor x, Tensor scale, {_RMS}, bool gains_wanted=True)"
_LAYER_BACKWARD = f"(Tensor dy, Tensor? dtotal, Tensor x, Tensor mean, Tensor scale, {_LAYER}, bool gains_wanted=True)"
# The same schemas as in operators.cpp, which explains their names.
SCHEMAS = (
    f"rms_norm(Tensor x, {_RMS}) -> Tensor",
    f"rms_norm_forward(Tensor x, {_RMS}) -> (Tensor y, Tensor scale)",
    f"rms_norm_autograd(Tensor x, {_RMS}) -> (Tensor y, Tensor scale)",
    f"add_rms_norm(Tensor x, Tensor residual, {_RMS}) -> (Tensor y, Tensor total)",
    f"add_rms_norm_forward(Tensor x, Tensor residual, {_RMS}) -> (Tensor y, Tensor total, Tensor scale)",
    f"add_rms_norm_autograd(Tensor x, Tensor residual, {_RMS}) -> (Tensor y, Tensor total, Tensor scale)",
    f"rms_norm_backward{_RMS_BACKWARD} -> (Tensor dx, Tensor dweight)",
    f"rms_norm_backward_blocks{_RMS_BACKWARD} -> (Tensor dx, Tensor dweight, Tensor blocks)",
    f"layer_norm(Tensor x, {_LAYER}) -> Tensor",
    f"layer_norm_forward(Tensor x, {_LAYER}) -> (Tensor y, Tensor mean, Tensor scale)",
    f"layer_norm_autograd(Tensor x, {_LAYER}) -> (Tensor y, Tensor mean, Tensor scale)",
    f"add_layer_norm(Tensor x, Tensor residual, {_LAYER}) -> (Tensor y, Tensor total)",
    f"add_layer_norm_forward(Tensor x, Tensor residual, {_LAYER})"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor scale)",
    f"add_layer_norm_autograd(Tensor x, Tensor residual, {_LAYER})"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor scale)",
    f"layer_norm_backward{_LAYER_BACKWARD} -> (Tensor dx, Tensor dweight, Tensor dbias)",
    f"layer_norm_backward_blocks{_LAYER_BACKWARD} -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor blocks)",
)
if cpu.unavailable():
    _definitions: Any = torch.library.Library("omninorm", "FRAGMENT")  # type: ignore[no-untyped-call]
    for _schema in SCHEMAS:
        _definitions.define(_schema)

_operators: Any = torch.ops.omninorm
# Looked up once, because a lookup takes about as long as normalizing one row.
_rms_norm: Any = _operators.rms_norm.default._op
_layer_norm: Any = _operators.layer_norm.default._op

# eps=None means the machine epsilon of the compute dtype. Other dtypes raise KeyError.
MACHINE_EPS = {
    dtype: torch.finfo(reference.compute_dtype(dtype)).eps
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
# Llama's order rounds x̂ before the gain. Other names raise KeyError.
ROUND_FIRST = {"fp32": False, "llama": True}


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str, *, traced: bool = False
) -> Tensor:
    """Compute `reference.rms_norm_forward`; the operator raises RuntimeError for mismatched arguments.

    `traced` is True while torch.compile or torch.export traces; they must record the operator itself.
    """
    if eps.__class__ is not float:
        eps = MACHINE_EPS[x.dtype] if eps is None else float(eps)
    round_first = ROUND_FIRST[cast]
    y: Tensor
    if is_exporting() if traced else is_tracing():
        y = _operators.rms_norm_autograd.default(x, weight, eps, gain_offset, round_first)[0]
    elif torch.is_grad_enabled() and (x.requires_grad or _needs_grad(weight)):
        watcher = None if traced else probe.current
        y = RMSNormFunction.apply(x, weight, eps, gain_offset, round_first, watcher)  # type: ignore[no-untyped-call]
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
    """Return the norm of x + residual, and x + residual."""
    residual = _other_than(residual, x)
    constants = eps if eps.__class__ is float else _eps(eps, x), gain_offset, ROUND_FIRST[cast]
    pair: tuple[Tensor, Tensor]
    if is_exporting() if is_compiling() else is_tracing():
        pair = _operators.add_rms_norm_autograd.default(x, residual, weight, *constants)[:2]
    elif torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or _needs_grad(weight)):
        pair = AddRMSNormFunction.apply(x, residual, weight, *constants, _watcher())  # type: ignore[no-untyped-call]
    else:
        pair = _operators.add_rms_norm.default(x, residual, weight, *constants)
    return pair


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, *, traced: bool = False
) -> Tensor:
    """Compute `reference.layer_norm_forward`."""
    if bias is weight:
        bias = _other_than(bias, weight)
    eps = eps if eps.__class__ is float else _eps(eps, x)
    y: Tensor
    if is_exporting() if traced else is_tracing():
        y = _operators.layer_norm_autograd.default(x, weight, bias, eps)[0]
    elif torch.is_grad_enabled() and (x.requires_grad or _needs_grad(weight) or _needs_grad(bias)):
        watcher = None if traced else probe.current
        y = LayerNormFunction.apply(x, weight, bias, eps, watcher)  # type: ignore[no-untyped-call]
    elif traced:
        y = _operators.layer_norm.default(x, weight, bias, eps)
    else:
        y = _layer_norm(x, weight, bias, eps)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and x + residual."""
    residual, bias = _other_than(residual, x), _other_than(bias, weight)
    eps = eps if eps.__class__ is float else _eps(eps, x)
    pair: tuple[Tensor, Tensor]
    if is_exporting() if is_compiling() else is_tracing():
        pair = _operators.add_layer_norm_autograd.default(x, residual, weight, bias, eps)[:2]
    elif torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or _needs_grad(weight) or _needs_grad(bias)
    ):
        pair = AddLayerNormFunction.apply(x, residual, weight, bias, eps, _watcher())  # type: ignore[no-untyped-call]
    else:
        pair = _operators.add_layer_norm.default(x, residual, weight, bias, eps)
    return pair


def _other_than(tensor: _MaybeTensor, first: Tensor | None) -> _MaybeTensor:
    """Return `tensor`, or a view of it if both are the same object, which Dynamo does not accept as two arguments."""
    return tensor if tensor is None or tensor is not first else tensor.view_as(tensor)


def _needs_grad(gain: Tensor | None) -> bool:
    return gain is not None and gain.requires_grad


def _watcher() -> probe.Probe | None:
    """Return the current probe; None while compiling, because each change of the probe would recompile the graph."""
    return None if is_compiling() else probe.current


def _eps(eps: float | None, x: Tensor) -> float:
    """Return ε as a float; it may be None or an integer, and `functional` has checked it."""
    return MACHINE_EPS[x.dtype] if eps is None else float(eps)


# Meta kernels: shapes and dtypes without values, for torch.compile, torch.export and meta tensors -----------------


def _like(x: Tensor) -> Tensor:
    if not x.is_meta:  # the dispatcher chose this kernel because the gain is on the meta device
        raise RuntimeError("omninorm: x and the gain must be on the same device")
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


def _with_blocks(dx: Tensor, dweight: Tensor, *dbias: Tensor) -> tuple[Tensor, ...]:
    """Return the results of the backward kernels and the block sums of dγ, with 0 blocks if dγ is not needed."""
    width = dx.shape[-1]
    rows = dx.numel() // width
    blocks = -(-rows // rows_per_block(rows, triton=False)) if dweight.shape[0] else 0
    return dx, dweight, *dbias, dx.new_empty((blocks, width), dtype=torch.float64)


META_KERNELS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, *_: _like(x),
    "rms_norm_forward": lambda x, *_: (_like(x), _one_per_row(x)),
    "add_rms_norm": lambda x, *_: (_like(x), _like(x)),
    "add_rms_norm_forward": lambda x, *_: (_like(x), _like(x), _one_per_row(x)),
    "rms_norm_backward": _meta_rms_norm_backward,
    "rms_norm_backward_blocks": lambda *given: _with_blocks(*_meta_rms_norm_backward(*given)),
    "layer_norm": lambda x, *_: _like(x),
    "layer_norm_forward": lambda x, *_: (_like(x), _one_per_row(x), _one_per_row(x)),
    "add_layer_norm": lambda x, *_: (_like(x), _like(x)),
    "add_layer_norm_forward": lambda x, *_: (_like(x), _like(x), _one_per_row(x), _one_per_row(x)),
    "layer_norm_backward": _meta_layer_norm_backward,
    "layer_norm_backward_blocks": lambda *given: _with_blocks(*_meta_layer_norm_backward(*given)),
}
META_KERNELS |= {
    name.replace("_forward", "_autograd"): made for name, made in META_KERNELS.items() if "_forward" in name
}
_meta: Any = torch.library.Library("omninorm", "IMPL", "Meta")  # type: ignore[no-untyped-call]
for _name, _kernel in META_KERNELS.items():
    _meta.impl(_name, _kernel)
exported.register()
