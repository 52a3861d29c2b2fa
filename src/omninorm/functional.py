"""The norms as functions. `checks` checks arguments; `kernels.dispatch` chooses the back end.

All of them take float16, bfloat16, float32 and float64 input of any strides, and the plain norms jagged nested tensors
too. Statistics and products are computed in float32 (float64 for float64 input) and rounded once, at the end. On the
proxies of torch.fx each function is recorded as one node, like those of torch.nn.functional.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.overrides import handle_torch_function

from omninorm.checks import (
    REFUSALS,
    check_float,
    check_gate,
    check_groups,
    check_layer_norm,
    check_modulation,
    check_pair,
    check_rms_norm,
    is_jagged,
    map_rows,
    overriding,
)
from omninorm.config import python_number
from omninorm.errors import InputError
from omninorm.kernels import dispatch, fused, operators
from omninorm.kernels.reference import compute_dtype, round_before_gain

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "gated_rms_norm",
    "l2_norm",
    "layer_norm",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "rms_norm",
    "z_score",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "sigmoid": torch.sigmoid}


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    gain_offset: float = 0.0,
    cast: str = "fp32",
    groups: int = 1,
    dim: int = -1,
) -> Tensor:
    """y = x / √(mean(x²) + ε) · (γ + gain_offset), over the last dimension.

    Args:
        x: (..., d), floating point.
        weight: γ, (d,), of any floating dtype; None means 1, and gain_offset is then not used.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype, as in torch.nn.RMSNorm.
        gain_offset: 1 for Gemma's form, whose stored gain starts at 0.
        cast: "fp32" rounds once, after the gain (torch.nn.RMSNorm, Gemma); "llama" also rounds to x's dtype
            before the gain (Llama, Qwen).
        groups: the features are divided into that many groups of d/groups neighbours, each with a mean of its own
            (Mamba-2); the gain still has one value per feature.
        dim: the dimension of the features, such as 1 for images of shape (batch, channels, height, width).

    Returns:
        x's shape and dtype.

    Raises:
        InputError: x is not a floating-point tensor (dense, or jagged nested) of width ≥ 1, the gain does not match
            its features, `groups` does not divide them, or a constant is out of range.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.

    Example:
        >>> rms_norm(torch.tensor([2.0, 4.0, 6.0, 8.0]))
        tensor([0.3651, 0.7303, 1.0954, 1.4606])
    """
    if dim != -1 or groups != 1:
        return _rms_norm_of_parts(x, weight, eps, gain_offset, cast, groups, dim)
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


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float | None = 1e-6, *, dim: int = -1
) -> Tensor:
    """y = (x − mean(x)) / √(var(x) + ε) · γ + β, over the last dimension, with the population variance.

    Args:
        x: (..., d), floating point.
        weight: γ, (d,), of any floating dtype; None means 1.
        bias: β, (d,), of any floating dtype; None means 0.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.
        dim: the dimension of the features, as in `rms_norm`.

    Returns:
        x's shape and dtype. A constant row gives exactly β.

    Raises:
        InputError: as `rms_norm`.

    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450.

    Example:
        >>> layer_norm(torch.tensor([2.0, 4.0, 6.0, 8.0]))
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """
    if dim != -1:
        if proxies := overriding(x, weight, bias):
            return handle_torch_function(layer_norm, proxies, x, weight, bias, eps, dim=dim)
        dim = _dimension(x, dim)
        return layer_norm(x.movedim(dim, -1), weight, bias, eps).movedim(-1, dim)
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
    dim = _dimension(x, dim)
    return layer_norm(x.movedim(dim, -1), eps=0.0).movedim(-1, dim)


# Norms that are made of the ones above. Between their parts everything is in the compute dtype ---------------------


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    activation: str = "silu",
    norm_first: bool = True,
    groups: int = 1,
    cast: str = "fp32",
) -> Tensor:
    """y = N(x) · γ · act(z), or N(x · act(z)) · γ if not `norm_first`, with N(v) = v / √(mean(v²) + ε) over each group.

    Args:
        x: (..., d), floating point.
        z: the gate before its activation, of x's shape, of any floating dtype.
        weight: γ, (d,), of any floating dtype; None means 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.
        activation: "silu" (Qwen3-Next, Mamba-2) or "sigmoid" (Kimi Linear).
        norm_first: True for Qwen3-Next and Kimi Linear, False for Mamba-2. If False, x · act(z) must be finite in
            float32 (float64 for float64 input).
        groups: the number of groups of neighbouring features, each with a mean of its own.
        cast: "fp32" rounds once, at the end (Kimi Linear); "llama" also rounds to x's dtype before and after the gain
            (Qwen3-Next; Mamba-2, whose gain comes last, before it).

    Returns:
        (..., d), in x's dtype.

    Raises:
        InputError: x and z differ in shape or device, the activation is unknown, or as `rms_norm`.

    Source: Mamba-2, Dao and Gu 2024, arXiv 2405.21060; Gated DeltaNet, Yang et al. 2024, arXiv 2412.06464.

    Example:
        >>> gated_rms_norm(torch.tensor([2.0, 4.0, 6.0, 8.0]), torch.tensor([-1.0, 0.0, 1.0, 2.0]))
        tensor([-0.0982,  0.0000,  0.8008,  2.5730])
    """
    if proxies := overriding(x, z, weight):
        options: dict[str, Any] = {"activation": activation, "norm_first": norm_first, "groups": groups, "cast": cast}
        return handle_torch_function(gated_rms_norm, proxies, x, z, weight, eps, **options)
    eps, groups = python_number(eps), python_number(groups)
    check_rms_norm(x, weight, eps, 0.0, cast)
    check_gate(x, z)
    check_groups(groups, x)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise InputError("activation must be silu or sigmoid", f"{activation!r:.40}", "choose one of them")
    dtype = compute_dtype(x.dtype)
    gate = ACTIVATIONS[activation](z.to(dtype))
    if not norm_first:
        return _normed_groups(x.to(dtype) * gate, weight, eps, 0.0, cast, groups, x.dtype).to(x.dtype)
    if cast == "llama" and groups == 1 and (weight is None or weight.dtype == x.dtype):
        normed = rms_norm(x, weight, eps, cast=cast).to(dtype)
    else:
        normed = _normed_groups(x, weight, eps, 0.0, cast, groups, x.dtype)
        if cast == "llama" and weight is not None:  # its product is in the gain's dtype if that is wider
            normed = normed.to(torch.promote_types(x.dtype, weight.dtype)).to(dtype)
    return (normed * gate).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """y = x / √(Σx² + ε), over the last dimension: rows of length 1, such as the queries and keys of Gated DeltaNet.

    It is RMSNorm with ε/d and the gain 1/√d.

    Args:
        x: (..., d), floating point, dense or jagged; the result has its shape and dtype.
        eps: ε ≥ 0.

    Raises:
        InputError: as `rms_norm`.

    Example:
        >>> l2_norm(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    if proxies := overriding(x):
        return handle_torch_function(l2_norm, proxies, x, eps)
    eps = python_number(eps)
    if eps is None:
        raise InputError("eps must be a finite number ≥ 0", "None", "use a small positive value such as 1e-6")
    check_rms_norm(x, None, eps, 0.0, "fp32")
    width = int(x.shape[-1])
    gain = torch.full((width,), width**-0.5, dtype=compute_dtype(x.dtype), device=x.device)
    return rms_norm(x, gain, eps / width)


def modulated_rms_norm(x: Tensor, scale: Tensor, shift: Tensor | None = None, eps: float | None = 1e-6) -> Tensor:
    """y = N(x) · (1 + scale) + shift, with N(x) = x / √(mean(x²) + ε): the adaptive norm of diffusion transformers.

    Args:
        x: (..., d), floating point.
        scale, shift: of any floating dtype and any shape that broadcasts to x's, such as (batch, 1, d); without a
            shift nothing is added.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.

    Returns:
        x's shape and dtype.

    Raises:
        InputError: scale or shift does not broadcast to x's shape; otherwise as `rms_norm`.

    Source: adaLN of DiT, Peebles and Xie 2022, arXiv 2212.09748.

    Example:
        >>> modulated_rms_norm(torch.tensor([2.0, 4.0, 6.0, 8.0]), torch.ones(1), torch.ones(4))
        tensor([1.7303, 2.4606, 3.1909, 3.9212])
    """
    if proxies := overriding(x, scale, shift):
        return handle_torch_function(modulated_rms_norm, proxies, x, scale, shift, eps)
    eps = python_number(eps)
    check_rms_norm(x, None, eps, 0.0, "fp32")
    return _modulated(rms_norm(x.to(compute_dtype(x.dtype)), eps=eps), x, scale, shift)


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor | None = None, eps: float | None = 1e-6) -> Tensor:
    """y = N(x) · (1 + scale) + shift, with N(x) = (x − mean(x)) / √(var(x) + ε): `modulated_rms_norm` for LayerNorm."""
    if proxies := overriding(x, scale, shift):
        return handle_torch_function(modulated_layer_norm, proxies, x, scale, shift, eps)
    eps = python_number(eps)
    check_layer_norm(x, None, None, eps)
    return _modulated(layer_norm(x.to(compute_dtype(x.dtype)), eps=eps), x, scale, shift)


def _modulated(normed: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    check_modulation("scale", scale, x)
    y = normed * (1.0 + scale.to(normed.dtype))
    if shift is not None:
        check_modulation("shift", shift, x)
        y = y + shift.to(normed.dtype)
    return y.to(x.dtype)


def _rms_norm_of_parts(
    x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str, groups: int, dim: int
) -> Tensor:
    """`rms_norm` over groups of features, or over another dimension than the last."""
    if proxies := overriding(x, weight):
        options: dict[str, Any] = {"gain_offset": gain_offset, "cast": cast, "groups": groups, "dim": dim}
        return handle_torch_function(rms_norm, proxies, x, weight, eps, **options)
    dim = _dimension(x, dim)
    rows = x.movedim(dim, -1)
    eps, gain_offset, groups = python_number(eps), python_number(gain_offset), python_number(groups)
    check_rms_norm(rows, weight, eps, gain_offset, cast)
    check_groups(groups, rows)
    return _normed_groups(rows, weight, eps, gain_offset, cast, groups, x.dtype).to(x.dtype).movedim(-1, dim)


def _normed_groups(
    x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str, groups: int, dtype: torch.dtype
) -> Tensor:
    """N(x) · γ in the compute dtype; "llama" rounds to `dtype` before the gain."""
    wide = x.to(compute_dtype(x.dtype))
    if groups == 1 and (cast == "fp32" or wide.dtype == dtype):
        return rms_norm(wide, weight, eps, gain_offset=gain_offset)
    normed = rms_norm(torch.unflatten(wide, -1, (groups, -1)), eps=eps).flatten(-2)
    normed = round_before_gain(normed, dtype, cast)
    return normed if weight is None else normed * (weight.to(normed.dtype) + gain_offset)


def _dimension(x: Tensor, dim: int) -> int:
    """Return `dim` if it is a dimension of x, which must be dense; raise InputError otherwise."""
    check_float("x", x)
    dim = python_number(dim)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        remedy = f"choose an integer from {-x.ndim} to {x.ndim - 1}" if x.ndim else "pass a tensor of features"
        raise InputError("dim must be a dimension of x", f"dim={dim!r} for shape {tuple(x.shape)}", remedy)
    return dim
