"""The definition of every norm: forward and derived backward, in plain PyTorch.

With x a row of d features, γ the gain, β the bias, o the gain offset, and · elementwise:

    RMSNorm    x̂ = x · r           r = 1/√(mean(x²) + ε)            y = x̂ · (γ + o)
    LayerNorm  x̂ = (x − μ) · r     r = 1/√(mean((x − μ)²) + ε)      y = x̂ · γ + β

    with g = dy · (γ + o):   RMSNorm    dx = r · (g − x̂ mean(g · x̂))              dγ = Σ_rows dy · x̂
                             LayerNorm  dx = r · (g − mean(g) − x̂ mean(g · x̂))    dβ = Σ_rows dy

Float16, bfloat16 and float32 are computed in float32, float64 in float64, and rounded once at the end.
Three measures keep the result accurate where the naive formula fails:

- Each row is divided by its *unit*, the next power of two above max(|x|, √ε). Multiplying by a power of two does not
  round, so ordinary rows have the same bits as without it, and no square overflows or underflows.
- LayerNorm subtracts the mean in two steps: first the rounded mean, then the rest that rounding left. The mean is
  summed from the differences to the row's first element, so a constant row becomes exactly 0.
- Sums run over contiguous rows in one order, which depends neither on the other rows nor on the number of threads.

Only x is kept for the backward pass, which computes the row statistics again. The backward functions consist of
differentiable operations, so they can be differentiated for second derivatives.

RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467. LayerNorm: Ba, Kiros and Hinton 2016, arXiv 1607.06450.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str) -> Tensor:
    """Return y (..., d) in x's dtype, from x (..., d) and γ (d,); not a view, so callers may change it in place."""
    normed, _ = standardize(x, eps, centered=False)
    normed = round_before_gain(normed, x.dtype, cast).reshape(x.shape)
    return (normed * gain(weight, gain_offset, normed.dtype)).to(x.dtype)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str
) -> tuple[Tensor, Tensor | None]:
    """Return dx (..., d) and dγ (d,), each in its input's dtype, from dy (..., d)."""
    normed, to_x = standardize(x, eps, centered=False)
    dy = as_rows(dy).to(normed.dtype)
    dnormed = dy * gain(weight, gain_offset, normed.dtype)
    dx = to_x(dnormed - normed * mean(dnormed * normed))
    if weight is None:
        return dx.to(x.dtype).reshape(x.shape), None
    dweight = column_sum(dy * round_before_gain(normed, x.dtype, cast))
    return dx.to(x.dtype).reshape(x.shape), dweight.to(weight.dtype)


def layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Tensor:
    """Return y (..., d) in x's dtype, from x (..., d), γ and β (d,); not a view."""
    normed, _ = standardize(x, eps, centered=True)
    y = normed.reshape(x.shape) * gain(weight, 0.0, normed.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx (..., d), dγ and dβ (d,), each in its input's dtype, from dy (..., d)."""
    normed, to_x = standardize(x, eps, centered=True)
    dy = as_rows(dy).to(normed.dtype)
    dnormed = dy * gain(weight, 0.0, normed.dtype)
    dx = to_x(dnormed - mean(dnormed) - normed * mean(dnormed * normed))
    dweight = None if weight is None else column_sum(dy * normed).to(weight.dtype)
    dbias = None if bias is None else column_sum(dy).to(bias.dtype)
    return dx.to(x.dtype).reshape(x.shape), dweight, dbias


# The pieces, in the order of their use ---------------------------------------------------------------------------


class Scale:
    """Multiplies each row by its r = 1/√(mean square + ε), which is stored as two factors, root and per_unit.

    As one number, r would overflow for subnormal rows without ε, and lose digits for the largest rows.
    """

    def __init__(self, root: Tensor, per_unit: Tensor) -> None:
        self.root = root
        self.per_unit = per_unit

    def __call__(self, rows: Tensor) -> Tensor:
        return rows * self.root * self.per_unit


def standardize(x: Tensor, eps: float | None, *, centered: bool) -> tuple[Tensor, Scale]:
    """Return x̂ (rows, d) in the compute dtype, and the multiplication by r that the backward pass ends with."""
    rows = as_rows(x).to(compute_dtype(x.dtype))
    eps = resolve_eps(eps, rows.dtype)
    headroom: Tensor | float = 1.0
    if centered:
        headroom = difference_headroom(rows)
        rows = rows * headroom - rounded_mean(rows) * headroom
    per_unit = reciprocal_unit(rows, eps)
    rows = rows * per_unit
    if centered:
        rows = rows - mean(rows)
    per_unit = per_unit * headroom
    root = torch.rsqrt(mean(rows * rows) + eps * per_unit * per_unit)
    return rows * root, Scale(root, per_unit)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which statistics and products are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve_eps(eps: float | None, dtype: torch.dtype) -> float:
    """Return ε, or for None the machine epsilon of the compute dtype, as in torch.nn.RMSNorm."""
    return torch.finfo(dtype).eps if eps is None else eps


def as_rows(x: Tensor) -> Tensor:
    """Reshape (..., d) to (rows, d), contiguous; a copy only if the strides require one."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def largest_magnitude(rows: Tensor) -> Tensor:
    """Return max |x| of each row, (rows, 1), detached: it only serves to choose a unit."""
    rows = rows.detach()
    return torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True))


def difference_headroom(rows: Tensor) -> Tensor:
    """Return ⅛ for rows so large that the difference of two elements could overflow, else 1; (rows, 1)."""
    limit = torch.finfo(rows.dtype).max / 8
    return torch.where(largest_magnitude(rows) > limit, 0.125, 1.0).to(rows.dtype)


def rounded_mean(rows: Tensor) -> Tensor:
    """Return the mean of each row, (rows, 1), accurate to one unit in its last place; exact for a constant row."""
    per_unit = reciprocal_unit(rows, 0.0)
    rows = rows * per_unit
    first = rows.narrow(1, 0, 1)
    return (first + mean(rows - first)) / per_unit


def reciprocal_unit(rows: Tensor, eps: float) -> Tensor:
    """Return 1 / unit of each row, (rows, 1): an exact power of two that scales max(|x|, √ε) into [½, 1)."""
    numbers = torch.finfo(rows.dtype)
    bounds = (max(math.sqrt(eps), numbers.tiny), numbers.max / 8)
    largest = largest_magnitude(rows).clamp(*bounds)  # at most max/8, so that the reciprocal is not subnormal
    mantissa, _ = torch.frexp(largest)
    return mantissa / largest


def mean(rows: Tensor) -> Tensor:
    """Return the mean of each row, (rows, 1)."""
    return ordered_sum(rows, 1) / rows.shape[1]


def column_sum(rows: Tensor) -> Tensor:
    """Return the sum over all rows, (d,), which a gain's gradient needs."""
    return ordered_sum(rows, 0).squeeze(0)


def ordered_sum(rows: Tensor, dim: int) -> Tensor:
    """Return the sum along `dim`, keeping the dimension, in an order that depends only on this dimension's size.

    PyTorch sums each row of a matrix on one thread, but splits a sum with a single result between threads.
    So a single row is summed together with a copy of itself.
    """
    other = 1 - dim
    if rows.shape[other] == 1:
        rows = torch.cat((rows, rows), other)
        return rows.sum(dim, keepdim=True).narrow(other, 0, 1)
    return rows.sum(dim, keepdim=True)


def gain(weight: Tensor | None, offset: float, dtype: torch.dtype) -> Tensor | float:
    """Return γ + o in the compute dtype, or 1 without a gain."""
    if weight is None:
        return 1.0
    weight = weight.to(dtype)
    return weight + offset if offset else weight


def round_before_gain(normed: Tensor, dtype: torch.dtype, cast: str) -> Tensor:
    """Round x̂ to the input's dtype if `cast` is "llama"; Llama does so before it multiplies by the gain.

    Derivatives treat the rounding as the identity, so they are never rounded to the narrow dtype.
    """
    if cast != "llama":
        return normed
    exact = normed.detach()
    if is_compiling() and not torch.compiler.is_exporting():
        return normed + (rounded_by_bits(exact, dtype) - exact)
    return normed + (exact.to(dtype).to(normed.dtype) - exact)


def rounded_by_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 numbers to values of a narrower dtype, ties to even; the result is still float32.

    This uses integer operations, because the compiler would remove a cast to the narrower dtype and back. Finite
    numbers beyond the narrower dtype's range do not become inf.
    """
    if x.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        return x
    dropped = 16 if dtype == torch.bfloat16 else 13  # bits of the mantissa that the narrower dtype lacks
    bits = x.view(torch.int32)
    is_odd = (bits >> dropped) & 1
    rounded = ((bits + ((1 << (dropped - 1)) - 1 + is_odd)) & -(1 << dropped)).view(torch.float32)
    numbers = torch.finfo(dtype)
    if dtype == torch.float16:
        spacing = numbers.smallest_normal * numbers.eps  # the distance between subnormal numbers of float16
        rounded = torch.where(x.abs() < numbers.smallest_normal, torch.round(x / spacing) * spacing, rounded)
    return torch.where(x.isfinite(), rounded, x)


# Autograd --------------------------------------------------------------------------------------------------------


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm_forward` with `rms_norm_backward` as its derivative; it takes the same arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str) -> Tensor:
        return rms_norm_forward(x, weight, eps, gain_offset, cast)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, *ctx.constants = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (*rms_norm_backward(dy, x, weight, *ctx.constants), None, None, None)


class LayerNormFunction(torch.autograd.Function):
    """`layer_norm_forward` with `layer_norm_backward` as its derivative; it takes the same arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Tensor:
        return layer_norm_forward(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.eps = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        return (*layer_norm_backward(dy, x, weight, bias, ctx.eps), None)
