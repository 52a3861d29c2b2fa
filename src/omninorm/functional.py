"""The norms as functions: arguments are checked here, `kernels.dispatch` chooses who computes.

All of them normalize over the last dimension, for float16, bfloat16, float32 and float64 input of any strides.
Statistics and products are taken in float32 (float64 for float64 input) and rounded once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omninorm.config import CASTS, LARGEST, is_finite
from omninorm.errors import InputError
from omninorm.kernels import dispatch, operators

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm", "z_score"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    gain_offset: float = 0.0,
    cast: str = "fp32",
) -> Tensor:
    """y = x / √(mean(x²) + ε) · (γ + gain_offset), over the last dimension.

    Args:
        x: (..., d), floating point.
        weight: γ, (d,), of any floating dtype; None means 1, and gain_offset is then not used.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype, as in torch.nn.RMSNorm.
        gain_offset: 1 for Gemma's form, whose stored gain starts at 0.
        cast: "fp32" rounds once, after the gain (torch.nn.RMSNorm, Gemma); "llama" also rounds to x's dtype
            before the gain (Llama, Qwen).

    Returns:
        (..., d), in x's dtype.

    Raises:
        InputError: x is not a dense floating-point tensor of width ≥ 1, the gain does not fit it, or a constant
            is out of range.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.

    Example:
        >>> rms_norm(torch.tensor([2.0, 4.0, 6.0, 8.0]))
        tensor([0.3651, 0.7303, 1.0954, 1.4606])
    """
    if dispatch.is_plain_cpu(x, weight, None, eps, gain_offset):
        try:
            return operators.rms_norm(x, weight, eps, gain_offset, cast)
        except REFUSALS:
            check_rms_norm(x, weight, eps, gain_offset, cast)
            raise
    check_rms_norm(x, weight, eps, gain_offset, cast)
    return dispatch.rms_norm(x, weight, eps, gain_offset, cast)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float | None = 1e-6) -> Tensor:
    """y = (x − mean(x)) / √(var(x) + ε) · γ + β, over the last dimension, with the population variance.

    Args:
        x: (..., d), floating point.
        weight: γ, (d,), of any floating dtype; None means 1.
        bias: β, (d,), of any floating dtype; None means 0.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.

    Returns:
        (..., d), in x's dtype. A constant row gives exactly β.

    Raises:
        InputError: as `rms_norm`.

    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450.

    Example:
        >>> layer_norm(torch.tensor([2.0, 4.0, 6.0, 8.0]))
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """
    if dispatch.is_plain_cpu(x, weight, bias, eps):
        try:
            return operators.layer_norm(x, weight, bias, eps)
        except REFUSALS:
            check_layer_norm(x, weight, bias, eps)
            raise
    check_layer_norm(x, weight, bias, eps)
    return dispatch.layer_norm(x, weight, bias, eps)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    gain_offset: float = 0.0,
    cast: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual rounded to x's dtype: a residual addition and the norm after it.

    Args:
        x, residual: (..., d), equal in shape and dtype. The others as in `rms_norm`.

    Returns:
        The normalized sum and the sum, bit for bit what the two steps give.

    Raises:
        InputError: x and residual differ in shape, dtype or device; otherwise as `rms_norm`.
    """
    check_pair(x, residual)
    check_rms_norm(x, weight, eps, gain_offset, cast)
    return dispatch.add_rms_norm(x, residual, weight, eps, gain_offset, cast)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) with s = x + residual rounded to x's dtype; `add_rms_norm` for LayerNorm."""
    check_pair(x, residual)
    check_layer_norm(x, weight, bias, eps)
    return dispatch.add_layer_norm(x, residual, weight, bias, eps)


def z_score(x: Tensor, dim: int = -1) -> Tensor:
    """z = (x − mean(x)) / std(x) along `dim`, std being the root of the *mean* squared deviation.

    It is LayerNorm without gain, bias and ε. Constant values have no spread: their z is 0/0, NaN.

    Args:
        x: any shape of at least one dimension, floating point.

    Raises:
        InputError: as `rms_norm`, or no such dimension.

    Example:
        >>> z_score(torch.tensor([10.0, 20.0, 30.0, 40.0]))
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """
    check_float("x", x)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise InputError("dim must be a dimension of x", f"dim={dim!r} for shape {tuple(x.shape)}", "choose another")
    return layer_norm(x.movedim(dim, -1), eps=0.0).movedim(-1, dim)


# Checks. The C++ operators check too, in a fraction of the time that a small norm takes; what they refuse is then put
# in words here.

REFUSALS = (RuntimeError, TypeError, KeyError)


def check_rms_norm(x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str) -> None:
    """Raises InputError unless these are arguments of `rms_norm`."""
    check_rows(x)
    check_gain("weight", weight, x)
    check_eps(eps)
    check_rounding(gain_offset, cast)


def check_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> None:
    """Raises InputError unless these are arguments of `layer_norm`."""
    check_rows(x)
    check_gain("weight", weight, x)
    check_gain("bias", bias, x)
    check_eps(eps)


def check_float(name: str, x: object) -> None:
    """Raises InputError unless `x` is a dense tensor of one of the four floating dtypes."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a torch.Tensor", type(x).__name__, "convert it with torch.as_tensor")
    if x.dtype not in FLOATS:
        remedy = f"convert it first, e.g. {name}.float()"
        raise InputError(f"{name} must be float16, bfloat16, float32 or float64", str(x.dtype), remedy)
    if x.is_nested:
        raise InputError(f"{name} must be a dense tensor", "a nested tensor", "pad it with to_padded_tensor")
    if x.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor", str(x.layout), f"use {name}.to_dense()")


def check_rows(x: Tensor) -> None:
    """Raises InputError unless `x` has a last dimension to normalize over."""
    check_float("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        remedy = "pass a tensor with features in its last dimension"
        raise InputError("x must have a last dimension of width ≥ 1", f"shape {tuple(x.shape)}", remedy)


def check_gain(name: str, gain: Tensor | None, x: Tensor) -> None:
    """Raises InputError unless `gain` is None or one value per feature of `x`, on its device."""
    if gain is None:
        return
    check_float(name, gain)
    if gain.shape != x.shape[-1:]:
        received = f"{tuple(gain.shape)} for x of shape {tuple(x.shape)}"
        raise InputError(f"{name} must have shape ({x.shape[-1]},), x's last dimension", received, "make them agree")
    check_device(name, gain, x)


def check_device(name: str, gain: Tensor, x: Tensor) -> None:
    """Raises InputError unless `gain` is where `x` is."""
    if gain.device != x.device:
        received = f"{gain.device} and {x.device}"
        raise InputError(f"{name} and x must be on one device", received, f"move one, e.g. {name}.to(x.device)")


def check_eps(eps: float | None) -> None:
    """Raises InputError unless `eps` is None or a finite number ≥ 0."""
    if eps is None:
        return
    if not is_finite(eps) or not 0 <= eps <= LARGEST:
        raise InputError("eps must be a finite number ≥ 0 or None", repr(eps), "pass e.g. 1e-6")


def check_rounding(gain_offset: float, cast: str) -> None:
    """Raises InputError unless the gain offset is finite and the casting order known."""
    if not is_finite(gain_offset) or abs(gain_offset) > LARGEST:
        raise InputError("gain_offset must be a finite number", repr(gain_offset), "pass 0.0, or 1.0 for Gemma's form")
    if cast not in CASTS:
        raise InputError(f"cast must be one of {', '.join(CASTS)}", repr(cast), "choose one of these")


def check_pair(x: Tensor, residual: Tensor) -> None:
    """Raises InputError unless `x` and `residual` can be added without broadcasting or promotion."""
    check_float("x", x)
    check_float("residual", residual)
    if (x.shape, x.dtype, x.device) != (residual.shape, residual.dtype, residual.device):
        received = f"{_describe(x)} and {_describe(residual)}"
        raise InputError("x and residual must agree in shape, dtype and device", received, "convert one of them")


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
