"""The back end "torch": PyTorch's own norm operators and their derivatives, on every device.

On CUDA and ROCm they are fused kernels, and Inductor decomposes them. `lacks` returns the reason if they can't compute
a norm as the numerics contract requires. Two more differences depend on values, which only the device knows, so they
can't be a reason to choose another back end: rows whose sum of squares overflows or underflows float32, and constant
rows of LayerNorm, are only as exact as in torch.nn.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from omninorm.kernels import reference
from omninorm.kernels.constants import constant_in_graphs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The limit exists because PyTorch's kernels for GPUs compute some offsets with 32 bits.
MOST_ELEMENTS = 2**31 - 1

# The operators that the functions of torch.nn.functional call. Autocast would cast the arguments of those functions to
# float32, but not these. The results are tuples that begin with y.
RMS_NORM: Any = torch._fused_rms_norm
LAYER_NORM: Any = torch.native_layer_norm
# The same operator as an object that Dynamo can trace; it does not trace the function.
_traced_rms_norm: Any = torch.ops.aten._fused_rms_norm.default


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, gain_offset: float = 0.0) -> Tensor:
    """Compute RMSNorm for arguments for which `lacks` returns an empty string."""
    if weight is not None and gain_offset:
        weight = weight + gain_offset  # not rounded: `lacks` excludes 16-bit gains
    if weight is not None and not has_kernel("_fused_rms_norm", x.device.type):
        weight = _widened(weight)  # the formula would round each row's part of the gain's gradient to the gain's dtype
    operator = _traced_rms_norm if is_compiling() else RMS_NORM
    y: Tensor = operator(x, x.shape[-1:], weight, eps)[0]
    return y


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute LayerNorm for arguments for which `lacks` returns an empty string."""
    dtype = x.dtype
    if x.is_cpu or not has_kernel("native_layer_norm", x.device.type):
        # The derivative on the CPU would store statistics and sums of the gain's gradient in 16 bits.
        x, weight, bias = x.to(reference.compute_dtype(dtype)), _widened(weight), _widened(bias)
    y: Tensor = LAYER_NORM(x, x.shape[-1:], weight, bias, eps)[0]
    return y.to(dtype)


def lacks(x: Tensor, *gains: Tensor | None, gain_offset: float = 0.0, cast: str = "fp32", traced: bool = False) -> str:
    """Return why these operators can't compute a norm as the numerics contract requires; empty if they can."""
    if x.dtype not in DTYPES:
        return f"they do not compute {x.dtype}"
    for gain in gains:
        if gain is not None and gain.dtype != x.dtype:
            return f"they need gains of x's dtype, {_name(x.dtype)}, not {_name(gain.dtype)}"
    if cast != "fp32":
        return f"they have no rounding order {cast!r}, only 'fp32'"
    if gain_offset and gains[0] is not None and reference.compute_dtype(x.dtype) != x.dtype:
        return f"they would round the sum of gain and offset to {_name(x.dtype)}"
    if no_derivative(x, *gains):
        return f"PyTorch has no derivative of its RMSNorm on {x.device.type}"
    if not traced and not 0 < x.numel() <= MOST_ELEMENTS:
        return f"they are used for 1 to {MOST_ELEMENTS:,} elements"
    return ""


def _widened(gain: Tensor | None) -> Tensor | None:
    return None if gain is None else gain.to(reference.compute_dtype(gain.dtype))


def no_derivative(x: Tensor, *gains: Tensor | None) -> bool:
    """Return whether a gradient is needed but the device's fused RMSNorm has no derivative, as on Apple GPUs."""
    required = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *gains))
    kind = x.device.type
    return required and has_kernel("_fused_rms_norm", kind) and not has_kernel("_fused_rms_norm_backward", kind)


@constant_in_graphs
def has_kernel(operator: str, device: str) -> bool:
    """Return whether a device has a kernel for one of PyTorch's operators; otherwise PyTorch composes it of others."""
    return _has_kernel(operator, device)


@cache
def _has_kernel(operator: str, device: str) -> bool:
    key = torch._C._dispatch_key_for_device(device)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
