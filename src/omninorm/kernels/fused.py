"""The back end "torch": PyTorch's own norm operators and their derivatives, on every device.

On CUDA and ROCm they are fused kernels, and Inductor decomposes them. `lacks` returns what they can't compute by the
numerics contract. Two more differences depend on the values, which only the device knows, so they can't be a reason to
choose another back end: rows whose sum of squares overflows or underflows float32, and constant rows of LayerNorm, are
as exact as in torch.nn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# PyTorch's kernels for GPUs compute some offsets with 32 bits.
MOST_ELEMENTS = 2**31 - 1

# The operators below torch.nn.functional, which autocast leaves alone: it would cast the arguments of the functions to
# float32. Their results are tuples, y first.
RMS_NORM: Any = torch._fused_rms_norm  # type: ignore[attr-defined]
LAYER_NORM: Any = torch.native_layer_norm
# The same operator for Dynamo, which does not trace the function.
_traced_rms_norm: Any = torch.ops.aten._fused_rms_norm.default


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Compute RMSNorm for arguments for which `lacks` returns nothing."""
    y: Tensor
    if x.is_cuda or x.is_cpu:
        operator = _traced_rms_norm if is_compiling() else RMS_NORM
        y = operator(x, x.shape[-1:], weight, eps)[0]
        return y
    # This function knows which devices have a derivative of the fused operator; MPS has none.
    y = torch.rms_norm(x, x.shape[-1:], weight, eps)
    return y.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute LayerNorm for arguments for which `lacks` returns nothing."""
    y: Tensor = LAYER_NORM(x, x.shape[-1:], weight, bias, eps)[0]
    return y


def lacks(x: Tensor, *gains: Tensor | None, gain_offset: float = 0.0, cast: str = "fp32", traced: bool = False) -> str:
    """Return why these operators can't compute a norm by the numerics contract; empty if they can."""
    if x.dtype not in DTYPES:
        return f"they do not compute {x.dtype}"
    for gain in gains:
        if gain is not None and gain.dtype != x.dtype:
            return f"they need gains of x's dtype, {_name(x.dtype)}, not {_name(gain.dtype)}"
    if cast != "fp32":
        return f"they have no rounding order {cast!r}, only 'fp32'"
    if gain_offset != 0:
        return "they can't add a gain offset in the compute dtype"
    if not traced and not 0 < x.numel() <= MOST_ELEMENTS:
        return f"they are used for 1 to {MOST_ELEMENTS:,} elements"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
