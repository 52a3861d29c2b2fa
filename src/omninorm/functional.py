"""The norms as functions. Arguments are checked here; `kernels.dispatch` chooses the back end.

The norms are computed over the last dimension (`z_score`: over any dimension), for float16, bfloat16, float32 and
float64 input with any strides. All functions but `z_score` also take jagged nested tensors. Statistics and products are
computed in float32 (float64 for float64 input) and rounded once, at the end. torch.fx records each function as one
node, like those of torch.nn.functional.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from omninorm.config import CASTS, LARGEST, is_finite, python_number
from omninorm.errors import InputError
from omninorm.kernels import dispatch, fused, operators

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
        InputError: x is not a floating-point tensor (dense or jagged nested) of width ≥ 1, the gain does not match
            x's last dimension or device, or a constant is out of range.

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
    if dispatch.is_plain_gpu("rms_norm", x, weight, None, eps, gain_offset, cast):
        try:
            eps = operators.MACHINE_EPS[x.dtype] if eps is None else eps
            return fused.RMS_NORM(x, x.shape[-1:], weight, eps)[0]  # type: ignore[no-any-return]
        except REFUSALS:
            check_rms_norm(x, weight, eps, gain_offset, cast)
            raise
    if proxies := overriding(x, weight):
        options: dict[str, Any] = {"gain_offset": gain_offset, "cast": cast}
        return handle_torch_function(rms_norm, proxies, x, weight, eps, **options)
    if is_jagged(x):
        return map_rows(lambda rows: rms_norm(rows, weight, eps, gain_offset=gain_offset, cast=cast), x)
    eps, gain_offset = python_number(eps), python_number(gain_offset)
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
    if dispatch.is_plain_gpu("layer_norm", x, weight, bias, eps):
        try:
            eps = operators.MACHINE_EPS[x.dtype] if eps is None else eps
            return fused.LAYER_NORM(x, x.shape[-1:], weight, bias, eps)[0]  # type: ignore[no-any-return]
        except REFUSALS:
            check_layer_norm(x, weight, bias, eps)
            raise
    if proxies := overriding(x, weight, bias):
        return handle_torch_function(layer_norm, proxies, x, weight, bias, eps)
    if is_jagged(x):
        return map_rows(lambda rows: layer_norm(rows, weight, bias, eps), x)
    eps = python_number(eps)
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
    """Return (rms_norm(s), s) with s = x + residual, rounded to x's dtype: a residual connection and the next norm.

    Args:
        x, residual: (..., d), with the same shape, dtype and device. The other arguments are those of `rms_norm`.

    Returns:
        The normalized sum and the sum, bit-identical to the results of the two separate steps.

    Raises:
        InputError: x and residual differ in shape, dtype or device; otherwise as `rms_norm`.

    Example:
        >>> add_rms_norm(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.ones(4))
        (tensor([0.3651, 0.7303, 1.0954, 1.4606]), tensor([2., 4., 6., 8.]))
    """
    if proxies := overriding(x, residual, weight):
        options: dict[str, Any] = {"gain_offset": gain_offset, "cast": cast}
        return handle_torch_function(add_rms_norm, proxies, x, residual, weight, eps, **options)
    check_pair(x, residual)
    if is_jagged(x):
        total = x + residual
        return rms_norm(total, weight, eps, gain_offset=gain_offset, cast=cast), total
    eps, gain_offset = python_number(eps), python_number(gain_offset)
    check_rms_norm(x, weight, eps, gain_offset, cast)
    return dispatch.add_rms_norm(x, residual, weight, eps, gain_offset, cast)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return (layer_norm(s), s) with s = x + residual, rounded to x's dtype: a residual connection and the next norm.

    Arguments, results and errors are those of `layer_norm` and `add_rms_norm`.

    Example:
        >>> add_layer_norm(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.ones(4))
        (tensor([-1.3416, -0.4472,  0.4472,  1.3416]), tensor([2., 4., 6., 8.]))
    """
    if proxies := overriding(x, residual, weight, bias):
        return handle_torch_function(add_layer_norm, proxies, x, residual, weight, bias, eps)
    check_pair(x, residual)
    if is_jagged(x):
        total = x + residual
        return layer_norm(total, weight, bias, eps), total
    eps = python_number(eps)
    check_layer_norm(x, weight, bias, eps)
    return dispatch.add_layer_norm(x, residual, weight, bias, eps)


def z_score(x: Tensor, dim: int = -1) -> Tensor:
    """z = (x − mean(x)) / std(x) along `dim`, where std is the population standard deviation (division by n).

    This is LayerNorm without gain, bias and ε. If all values are equal, their standard deviation is 0 and z is NaN.

    Args:
        x: a dense floating-point tensor with at least one dimension.
        dim: the dimension to normalize over.

    Returns:
        A tensor with x's shape and dtype.

    Raises:
        InputError: as `rms_norm`; also if x is a nested tensor or has no dimension `dim`.

    Example:
        >>> z_score(torch.tensor([10.0, 20.0, 30.0, 40.0]))
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """
    if proxies := overriding(x):
        return handle_torch_function(z_score, proxies, x, dim)
    check_float("x", x)
    dim = python_number(dim)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        remedy = f"choose an integer from {-x.ndim} to {x.ndim - 1}" if x.ndim else "pass a tensor of features"
        raise InputError("dim must be a dimension of x", f"dim={dim!r} for shape {tuple(x.shape)}", remedy)
    return layer_norm(x.movedim(dim, -1), eps=0.0).movedim(-1, dim)


# Proxies and jagged tensors --------------------------------------------------------------------------------------


def overriding(*arguments: object) -> list[Any]:
    """Return the arguments with `__torch_function__` that are not tensors, such as torch.fx's proxies."""
    return [
        argument
        for argument in arguments
        if not (argument is None or isinstance(argument, Tensor)) and hasattr(type(argument), "__torch_function__")
    ]


def is_jagged(x: object) -> bool:
    """Return whether `x` is a nested tensor in the jagged layout."""
    return isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged


def map_rows(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a norm to a jagged nested tensor: rows are independent, so all values are normalized as one dense tensor.

    Raises:
        InputError: the jagged dimension is the last one, that of the features.
    """
    ragged: int = x._ragged_idx  # type: ignore[attr-defined]
    if ragged == x.ndim - 1:
        remedy = "transpose it so that the features are the last dimension"
        raise InputError("A nested tensor must have the same number of features everywhere", f"shape {x.shape}", remedy)
    return torch.nested.nested_tensor_from_jagged(
        norm(x.values()),  # includes rows that belong to no sequence, if there are gaps
        x.offsets(),  # type: ignore[attr-defined]
        x.lengths(),  # type: ignore[attr-defined]
        jagged_dim=ragged,
        min_seqlen=x._maybe_min_seqlen,  # type: ignore[attr-defined]
        max_seqlen=x._maybe_max_seqlen,  # type: ignore[attr-defined]
    )


# Checks. For small norms they would take longer than the norm. So where C++ operators are called directly, which check
# the arguments themselves, these functions are called only after an operator refused them, to raise a readable error.

REFUSALS = (RuntimeError, TypeError, KeyError)


def check_rms_norm(x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str) -> None:
    """Raise InputError unless these are valid arguments of `rms_norm`."""
    check_rows(x)
    check_gain("weight", weight, x)
    check_eps(eps)
    check_rounding(gain_offset, cast)


def check_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> None:
    """Raise InputError unless these are valid arguments of `layer_norm`."""
    check_rows(x)
    check_gain("weight", weight, x)
    check_gain("bias", bias, x)
    check_eps(eps)


def check_float(name: str, x: object) -> None:
    """Raise InputError unless `x` is a dense tensor of one of the four floating-point dtypes."""
    if not isinstance(x, Tensor):
        received = f"{type(x).__name__} {x!r:.40}" if isinstance(x, (bool, int, float, str)) else type(x).__name__
        raise InputError(f"{name} must be a torch.Tensor", received, "convert it with torch.as_tensor")
    if x.dtype not in FLOATS:
        remedy = f"convert it first, e.g. with {name}.float()"
        raise InputError(f"{name} must be float16, bfloat16, float32 or float64", str(x.dtype), remedy)
    if x.is_nested:
        if x.layout == torch.jagged:
            remedy = "pass a dense tensor, e.g. its padded form from to_padded_tensor"
            raise InputError(f"{name} can't be a nested tensor here", "", remedy)
        remedy = "build it with torch.nested.nested_tensor(…, layout=torch.jagged), or pad it with to_padded_tensor"
        raise InputError(f"{name} must be a dense or a jagged nested tensor", "a strided nested tensor", remedy)
    if x.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor", str(x.layout), f"convert it with {name}.to_dense()")


def check_rows(x: Tensor) -> None:
    """Raise InputError unless `x` has a last dimension to normalize over."""
    check_float("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        remedy = "pass a tensor with features in its last dimension"
        raise InputError("x must have a last dimension of width ≥ 1", f"shape {tuple(x.shape)}", remedy)


def check_gain(name: str, gain: Tensor | None, x: Tensor) -> None:
    """Raise InputError unless `gain` has one value per feature of `x` and is on x's device, or is None."""
    if gain is None:
        return
    check_float(name, gain)
    if gain.shape != x.shape[-1:]:
        received = f"{tuple(gain.shape)} for x of shape {tuple(x.shape)}"
        remedy = f"pass a {name} with one value per feature of x"
        raise InputError(f"{name} must have shape ({x.shape[-1]},), like x's last dimension", received, remedy)
    check_device(name, gain, x)


def check_device(name: str, gain: Tensor, x: Tensor) -> None:
    """Raise InputError unless `gain` is on x's device."""
    if gain.device != x.device:
        received = f"{gain.device} and {x.device}"
        raise InputError(f"{name} and x must be on the same device", received, f"move {name}: {name}.to(x.device)")


def check_eps(eps: float | None) -> None:
    """Raise InputError unless `eps` is a finite number ≥ 0, or None."""
    if eps is None:
        return
    if not is_finite(eps) or not 0 <= eps <= LARGEST:
        remedy = "use a small positive value such as 1e-6"
        raise InputError("eps must be a finite number ≥ 0, or None", f"{eps!r:.40}", remedy)


def check_rounding(gain_offset: float, cast: str) -> None:
    """Raise InputError unless the gain offset is a finite number and `cast` one of `CASTS`."""
    if not is_finite(gain_offset) or abs(gain_offset) > LARGEST:
        remedy = "use 0.0, or 1.0 for Gemma's norms, whose gains start at 0"
        raise InputError("gain_offset must be a finite number", f"{gain_offset!r:.40}", remedy)
    if cast not in CASTS:
        raise InputError(f"cast must be one of {', '.join(CASTS)}", repr(cast), "choose one of these")


def check_pair(x: Tensor, residual: Tensor) -> None:
    """Raise InputError unless `x` and `residual` can be added without broadcasting or promotion."""
    for name, tensor in (("x", x), ("residual", residual)):
        if not is_jagged(tensor):
            check_float(name, tensor)
    if (x.shape, x.dtype, x.device) != (residual.shape, residual.dtype, residual.device):
        received = f"{_describe(x)} and {_describe(residual)}"
        raise InputError("x and residual must have the same shape, dtype and device", received, "convert one of them")


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
