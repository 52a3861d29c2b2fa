"""The formulas of NUMERICS in float64, literally, and what "n ulp" means. Nothing of omninorm is used here."""

import torch
from torch import Tensor

# Units in the last place that a forward result may be off, per dtype. Two float64 evaluations are compared where
# the dtype is float64, and either may be off by four.
FORWARD_ULP = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4, torch.float64: 8}
# A gain's gradient, relative to the sum of its terms' magnitudes; float64's is float32's scaled by their precision.
GAIN_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-6 * 2.0**-29}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded_eps(eps: float, dtype: torch.dtype) -> float:
    """ε as the compute dtype holds it."""
    return torch.tensor(eps, dtype=compute_dtype(dtype)).item()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, gain_offset: float = 0.0) -> Tensor:
    normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * (weight + gain_offset)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    deviation = deviation - deviation.mean(-1, keepdim=True)  # what rounding left of the mean: it shows in float64
    y = deviation / torch.sqrt((deviation * deviation).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def double(x: Tensor | None, *, leaf: bool = True) -> Tensor | None:
    return None if x is None else x.detach().double().requires_grad_(leaf)


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at `magnitude` (float64), never below the smallest subnormal."""
    numbers = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.double().clamp(min=numbers.tiny)).exponent - 1
    return torch.ldexp(torch.ones_like(magnitude, dtype=torch.float64), exponent) * numbers.eps


def row_max(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def forward_share(y: Tensor, expected: Tensor) -> Tensor:
    """The largest error of a forward result as a share of the allowed one: FORWARD_ULP of the float64 value, in ulps of
    its row's largest magnitude."""
    assert y.shape == expected.shape
    return _share((y.double() - expected).abs(), FORWARD_ULP[y.dtype] * ulp(row_max(expected), y.dtype))


def input_gradient_share(dx: Tensor, expected: Tensor, terms: Tensor) -> Tensor:
    """The same for dx: four times the forward's tolerance, and the rounding of the terms whose difference dx is.

    dx = r·(g − …) can be far smaller than its terms: for width 1 they cancel down to ε's share. Each term carries
    the roundings of two products and a mean in the compute dtype, so eight of its ulps are allowed beside.
    """
    assert dx.shape == expected.shape
    if dx.numel() == 0:
        return torch.zeros((), dtype=torch.float64)
    allowed = 4 * FORWARD_ULP[dx.dtype] * ulp(row_max(expected), dx.dtype)
    allowed = allowed + 8 * ulp(row_max(terms), compute_dtype(dx.dtype))
    return _share((dx.double() - expected).abs(), allowed)


def gain_gradient_share(
    dweight: Tensor, expected: Tensor, terms: Tensor, floor: Tensor, compute: torch.dtype
) -> Tensor:
    """The same for a gain's gradient: GAIN_TOLERANCE of the sum of |terms| over rows, and half an ulp for the rounding
    to the gain's dtype.

    `floor` is what each term's error cannot go below, in units of the compute dtype's epsilon: |dy| for LayerNorm's
    x̂, a difference from a mean that is itself rounded relative to the row's spread (x̂'s is 1), else 0.
    """
    assert dweight.shape == expected.shape
    total, least = (t.abs().reshape(-1, t.shape[-1]).sum(0) for t in (terms, floor))
    allowed = GAIN_TOLERANCE[compute] * total + torch.finfo(compute).eps * least
    allowed = allowed + 0.5 * ulp(expected.abs(), dweight.dtype)
    return _share((dweight.double() - expected).abs(), allowed)


def assert_forward(y: Tensor, expected: Tensor) -> None:
    _assert_allowed(forward_share(y, expected), y)


def assert_input_gradient(dx: Tensor, expected: Tensor, terms: Tensor) -> None:
    _assert_allowed(input_gradient_share(dx, expected, terms), dx)


def assert_gain_gradient(dweight: Tensor, expected: Tensor, terms: Tensor, floor: Tensor, compute: torch.dtype) -> None:
    _assert_allowed(gain_gradient_share(dweight, expected, terms, floor, compute), dweight)


def _share(error: Tensor, allowed: Tensor) -> Tensor:
    """NaN if anything is NaN."""
    return (error / allowed).max() if error.numel() else torch.zeros((), dtype=torch.float64)


def _assert_allowed(share: Tensor, result: Tensor) -> None:
    assert share <= 1, f"{share:.3g} × the allowed error in {result.dtype}"
