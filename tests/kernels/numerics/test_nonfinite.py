"""Extreme and non-finite rows, which take a slow path, among ordinary rows, which must keep their bits.

Where float64 does not determine which NaN comes first, the reference is the standard.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import oracle
from helpers.norm_checks import DTYPES
from torch import Tensor

from omninorm import functional
from omninorm.kernels import dispatch

NORMS = [functional.rms_norm, functional.layer_norm]
ADD_NORMS = [functional.add_rms_norm, functional.add_layer_norm]
INF, NAN = float("inf"), float("nan")
WIDTH = 37


def row_of(kind: str, dtype: torch.dtype) -> Tensor:
    """A row whose r the kernels can't compute on their fast path, or that has none."""
    numbers = torch.finfo(dtype)
    row = torch.randn(WIDTH, dtype=torch.float64).clamp(-3, 3)
    rows = {
        "huge": row / 3 * numbers.max,
        "one huge element": torch.cat((row[:-1], torch.tensor([numbers.max], dtype=torch.float64))),
        "zero": row * 0,
        "tiny": row * numbers.tiny,
        "infinite": torch.cat((torch.tensor([INF], dtype=torch.float64), row[1:])),
        "of both infinities": torch.cat((torch.tensor([INF, -INF], dtype=torch.float64), row[2:])),
        "undefined": torch.cat((row[:-1], torch.tensor([NAN], dtype=torch.float64))),
    }
    return rows[kind].to(dtype)


KINDS = ["huge", "one huge element", "zero", "tiny", "infinite", "of both infinities", "undefined"]


def gradients(norm: Callable[..., Tensor], x: Tensor, weight: Tensor, dy: Tensor, eps: float) -> list[Tensor]:
    """y, dx and dγ."""
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = norm(*leaves, eps=eps)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_rows_of_its_group_keep_their_bits(
    kind: str, norm: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """At several places of two groups of four rows and one more row. With this small ε, tiny rows take the slow path too."""
    clean, dy, weight = torch.randn(9, WIDTH).to(dtype), torch.randn(9, WIDTH).to(dtype), torch.randn(WIDTH)
    y, dx, _ = gradients(norm, clean, weight, dy, 1e-40)
    for place in (0, 2, 3, 4, 8):
        x = clean.clone()
        x[place] = row_of(kind, dtype)
        y_beside, dx_beside, _ = gradients(norm, x, weight, dy, 1e-40)
        others = [row for row in range(9) if row != place]
        assert torch.equal(y_beside[others], y[others])
        assert torch.equal(dx_beside[others], dx[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["huge", "one huge element", "zero", "tiny"])
def test_extreme_rows_count_in_the_gain_gradient(kind: str, norm: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """ε = 1e-12, with which zero rows have a finite gradient in every dtype."""
    eps = oracle.rounded_eps(1e-12, dtype)
    for place in (0, 2, 3, 4, 8):
        x, dy, weight = torch.randn(9, WIDTH).to(dtype), torch.randn(9, WIDTH).to(dtype), torch.randn(WIDTH)
        x[place] = row_of(kind, dtype)
        _, _, dweight = gradients(norm, x, weight, dy, eps)
        normed = normalized(norm, x, eps)
        floor = dy.double() if norm is functional.layer_norm else torch.zeros_like(normed)
        terms = dy.double() * normed
        oracle.assert_gain_gradient(dweight, terms.sum(0), terms, floor, oracle.compute_dtype(dtype))


def normalized(norm: Callable[..., Tensor], x: Tensor, eps: float) -> Tensor:
    """x̂ in float64, in units in which no square overflows: float64 itself is among the dtypes."""
    unit = x.double().abs().amax(-1, keepdim=True).clamp(min=1.0)
    unit = torch.ldexp(torch.ones_like(unit), torch.frexp(unit).exponent - 1)
    rows = x.double() / unit
    if norm is functional.layer_norm:
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows - rows.mean(-1, keepdim=True)
    return rows / torch.sqrt((rows * rows).mean(-1, keepdim=True) + eps / unit / unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_nan_and_infinity_appear_where_the_reference_has_them(norm: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """In y, dx and the gain's gradient, for bad numbers in x, in dy and in the gain.

    An infinite dy or gain gives dx infinite terms, and which of them meet as ∞ − ∞ depends on the order of the
    additions. So there what is asked for is that the same elements are finite.
    """
    for eps, bad, where in itertools.product((0.0, 1e-6), (INF, -INF, NAN, 0.0), ("x", "dy", "weight", "nowhere")):
        x, dy, weight = torch.randn(9, WIDTH).to(dtype), torch.randn(9, WIDTH).to(dtype), torch.randn(WIDTH)
        for row, kind in enumerate(KINDS):
            x[row] = row_of(kind, dtype)
        if where != "nowhere":
            {"x": x[8], "dy": dy[8], "weight": weight}[where][5] = bad
        ours = gradients(norm, x, weight, dy, eps)
        with dispatch.use_backend("reference"):
            theirs = gradients(norm, x, weight, dy, eps)
        for what, a, b in zip(("y", "dx", "dweight"), ours, theirs, strict=True):
            case = f"{what} with {bad} in {where}, {eps=}"
            assert torch.equal(a.isfinite(), b.isfinite()), f"not finite: {case}"
            if what != "dx" or where in ("x", "nowhere"):
                assert torch.equal(a.isnan(), b.isnan()), f"NaN: {case}"
                assert torch.equal(a[b.isinf()], b[b.isinf()]), f"infinite: {case}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("add_norm", "norm"), list(zip(ADD_NORMS, NORMS, strict=True)))
def test_add_variants_are_the_two_steps_for_extreme_rows(add_norm, norm, dtype: torch.dtype) -> None:
    residual = torch.zeros(9, WIDTH, dtype=dtype)
    x, along, weight = torch.randn(9, WIDTH).to(dtype), torch.randn(2, 9, WIDTH).to(dtype), torch.randn(WIDTH)
    for row, kind in enumerate(KINDS):
        x[row] = row_of(kind, dtype)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    ours = add_norm(*leaves)
    total = x + residual
    theirs = norm(total, weight), total
    ours, theirs = ([*pair, *torch.autograd.grad(pair, leaves, [*along])] for pair in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
