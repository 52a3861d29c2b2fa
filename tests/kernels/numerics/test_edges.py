"""Known failure modes of normalization code: one test for each row of the table in docs/numerics.md."""

from collections.abc import Callable

import pytest
import torch
from helpers import exactness, oracle
from helpers.norm_checks import MANY_ROWS
from torch import Tensor

from omninorm import functional

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def assert_same_values(y: Tensor, expected: Tensor) -> None:
    """NaN where NaN, infinite where infinite, else within the forward tolerance of the finite values."""
    finite = expected.isfinite()
    torch.testing.assert_close(y.double()[~finite], expected[~finite], equal_nan=True, rtol=0, atol=0)
    allowed = oracle.FORWARD_ULP[y.dtype] * oracle.ulp(torch.where(finite, expected, 0.0).abs(), y.dtype)
    assert ((y.double() - expected).abs() <= allowed)[finite].all()


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e5, 1e6])
def test_large_mean_small_spread(ratio: float) -> None:
    """One-pass variance loses everything here: mean² swamps the spread."""
    x = (torch.randn(16, 768) + ratio).requires_grad_()
    exact = oracle.double(x)
    y, expected = (
        functional.layer_norm(x, eps=1e-5),
        oracle.layer_norm(exact, None, None, oracle.rounded_eps(1e-5, x.dtype)),
    )
    oracle.assert_forward(y.detach(), expected.detach())
    dy = torch.randn_like(x)
    y.backward(dy)
    expected.backward(dy.double())
    terms = 3 * dy.double() / exact.detach().std(-1, correction=0, keepdim=True)
    oracle.assert_input_gradient(x.grad, exact.grad, terms)


@pytest.mark.parametrize("where", [0, 300, 767])
def test_large_outlier_at_any_place(where: int) -> None:
    """The element that is subtracted first may itself be the outlier."""
    x = torch.randn(4, 768)
    x[:, where] = 1e4
    oracle.assert_forward(
        functional.layer_norm(x), oracle.layer_norm(x.double(), None, None, oracle.rounded_eps(1e-6, x.dtype))
    )


@pytest.mark.parametrize("value", [0.1, -3.7, 1e-30, 1e4, 6e4, 1e20, 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_row_gives_exactly_the_bias(dtype: torch.dtype, value: float) -> None:
    for width in (1, 2, 3, 7, 127, 768):
        check_constant_row(dtype, min(value, torch.finfo(dtype).max), width)


def check_constant_row(dtype: torch.dtype, value: float, width: int) -> None:
    x = torch.full((2, width), value, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype)
    y = functional.layer_norm(x, weight, bias)
    assert torch.equal(y, bias.expand(2, width))
    dy = torch.randn(2, width, dtype=dtype)
    y.backward(dy)
    g = dy.double() * weight.double()
    expected = 1e3 * (g - g.mean(-1, keepdim=True))
    oracle.assert_input_gradient(x.grad, expected, 2e3 * g)


@pytest.mark.parametrize("scale", [1e10, 1e19, 1e25, 1e37, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_whose_squares_overflow(dtype: torch.dtype, scale: float) -> None:
    x = (torch.randn(8, 100).clamp(-3, 3) * scale).to(dtype).requires_grad_()
    dy = torch.randn(8, 100).to(dtype)
    for ours, exact_norm in [
        (functional.rms_norm(x), lambda x: oracle.rms_norm(x, None, 0.0)),
        (functional.layer_norm(x), lambda x: oracle.layer_norm(x, None, None, 0.0)),
    ]:
        exact = oracle.double(x)
        expected = exact_norm(exact)
        oracle.assert_forward(ours.detach(), expected.detach())
        (dx,) = torch.autograd.grad(ours, x, dy)
        expected.backward(dy.double())
        oracle.assert_input_gradient(dx, exact.grad, 3 * dy.double() / scale)


def test_float16_squares_overflow_float16() -> None:
    x = torch.tensor([[60000.0, -60000.0, 30000.0, 0.0]], dtype=torch.float16)
    oracle.assert_forward(functional.rms_norm(x), oracle.rms_norm(x.double(), None, 1e-6))
    oracle.assert_forward(functional.layer_norm(x), oracle.layer_norm(x.double(), None, None, 1e-6))


def test_differences_that_overflow() -> None:
    """The largest float32 and its opposite: even their difference has no float32."""
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest, largest, 1.0], [-largest, largest, 0.0, -1.0]])
    oracle.assert_forward(functional.layer_norm(x), oracle.layer_norm(x.double(), None, None, 1e-6))
    oracle.assert_forward(functional.rms_norm(x), oracle.rms_norm(x.double(), None, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_non_finite_values_as_in_float64_and_other_rows_untouched(dtype: torch.dtype, bad: float) -> None:
    clean = torch.randn(3, 7).to(dtype)
    for place in (0, 3, 6):
        x = clean.clone()
        x[1, place] = bad
        for norm, exact_norm in [
            (functional.rms_norm, lambda x: oracle.rms_norm(x, None, 1e-6)),
            (functional.layer_norm, lambda x: oracle.layer_norm(x, None, None, 1e-6)),
        ]:
            y = norm(x)
            assert_same_values(y[1], exact_norm(x.double())[1])
            assert torch.equal(y[[0, 2]], norm(clean)[[0, 2]])


def test_infinities_of_both_signs_and_a_constant_infinite_row() -> None:
    x = torch.tensor([[INF, -INF, 1.0], [INF, INF, INF], [NAN, INF, 0.0]])
    assert_same_values(functional.rms_norm(x), oracle.rms_norm(x.double(), None, 1e-6))
    assert_same_values(functional.layer_norm(x), oracle.layer_norm(x.double(), None, None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_give_zero_and_finite_gradients(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 5, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 5, dtype=dtype)
    for norm in (functional.rms_norm, functional.layer_norm):
        y = norm(x, eps=1e-4)
        assert torch.equal(y, torch.zeros_like(y))
        (dx,) = torch.autograd.grad(y, x, dy)
        g = dy.double()
        expected = 100 * (g if norm is functional.rms_norm else g - g.mean(-1, keepdim=True))
        oracle.assert_input_gradient(dx, expected, 200 * g)


SMALL = [1e-20, 1e-30, 1e-38, 1e-42]


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-30])
@pytest.mark.parametrize("scale", SMALL)
def test_tiny_and_subnormal_rows(scale: float, eps: float) -> None:
    """In float32 their squares are 0; without ε the result must still be of order 1."""
    x = torch.randn(4, 33) * scale
    eps_used = oracle.rounded_eps(eps, torch.float32)
    oracle.assert_forward(functional.rms_norm(x, eps=eps), oracle.rms_norm(x.double(), None, eps_used))
    oracle.assert_forward(functional.layer_norm(x, eps=eps), oracle.layer_norm(x.double(), None, None, eps_used))


def test_without_eps_a_zero_row_is_undefined_as_in_float64() -> None:
    x = torch.zeros(1, 4)
    assert functional.rms_norm(x, eps=0.0).isnan().all()
    assert functional.layer_norm(x + 1, eps=0.0).isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 0, 3)])
def test_an_empty_batch_has_zero_gain_gradients(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    weight, bias = torch.randn(shape[-1], requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    y = functional.layer_norm(x, weight, bias) + functional.rms_norm(x, weight)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("rows", MANY_ROWS)
def test_a_bfloat16_gain_gradient_over_many_rows(rows: int) -> None:
    """Accumulated in bfloat16 the sum would stop at 256."""
    x = torch.ones(rows, 2, dtype=torch.bfloat16)
    weight = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    functional.rms_norm(x, weight, eps=0.0).backward(torch.ones_like(x))
    assert weight.grad.tolist() == [rows, rows]


@pytest.mark.parametrize("rows", MANY_ROWS)
@pytest.mark.parametrize("width", [4, 7, 8])
def test_gain_gradients_over_many_bfloat16_rows(width: int, rows: int) -> None:
    x, dy = torch.randn(rows, width).bfloat16(), torch.randn(rows, width).bfloat16()
    weight, bias = torch.randn(width, requires_grad=True), torch.randn(width, requires_grad=True)
    exact, along, eps = x.double(), dy.double(), oracle.rounded_eps(1e-6, x.dtype)
    none = torch.zeros_like(along)
    (dweight,) = torch.autograd.grad(functional.rms_norm(x, weight), weight, dy)
    terms = along * oracle.rms_norm(exact, None, eps)
    oracle.assert_gain_gradient(dweight, terms.sum(0), terms, none, torch.float32)
    dweight, dbias = torch.autograd.grad(functional.layer_norm(x, weight, bias), (weight, bias), dy)
    terms = along * oracle.layer_norm(exact, None, None, eps)
    oracle.assert_gain_gradient(dweight, terms.sum(0), terms, along, torch.float32)
    oracle.assert_gain_gradient(dbias, along.sum(0), along, none, torch.float32)


def test_a_gain_near_zero_still_has_the_right_gradient() -> None:
    """Recovering x̂ as y/γ would give 0/0."""
    x, dy = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    weight = torch.full((8,), 1e-40, requires_grad=True)
    weight.data[3] = 0.0
    functional.rms_norm(x, weight).backward(dy)
    normed = oracle.rms_norm(x.detach().double(), None, 1e-6)
    terms = dy.double() * normed
    oracle.assert_gain_gradient(weight.grad, terms.sum(0), terms, torch.zeros_like(terms), torch.float32)
    assert x.grad.isfinite().all()


def test_the_callers_gradient_is_not_changed() -> None:
    x = torch.randn(3, 6, requires_grad=True)
    dy = torch.randn(3, 6)
    before = dy.clone()
    for norm in (functional.rms_norm, functional.layer_norm):
        torch.autograd.grad(norm(x), x, dy)
    assert torch.equal(dy, before)


def test_eps_none_is_the_compute_dtypes_epsilon() -> None:
    """As torch.nn.RMSNorm: float32's for narrower input."""
    for dtype in DTYPES:
        x = torch.full((1, 4), 1e-3, dtype=dtype)
        eps = torch.finfo(oracle.compute_dtype(dtype)).eps
        oracle.assert_forward(functional.rms_norm(x, eps=None), oracle.rms_norm(x.double(), None, eps))


@pytest.mark.parametrize(("x_scale", "dy_scale"), [(1e10, 1e29), (1e18, 1e20), (1e-12, 1e-27), (1e-6, 1e-33)])
def test_gradients_far_from_one(x_scale: float, dy_scale: float) -> None:
    """dy · x overflows float32 here, or vanishes in it, and dx does neither."""
    x, dy = (torch.randn(4, 64) * x_scale).requires_grad_(), torch.randn(4, 64) * dy_scale
    for ours, exact_norm in [
        (functional.rms_norm(x, eps=0.0), lambda x: oracle.rms_norm(x, None, 0.0)),
        (functional.layer_norm(x, eps=0.0), lambda x: oracle.layer_norm(x, None, None, 0.0)),
    ]:
        exact = oracle.double(x)
        exact_norm(exact).backward(dy.double())
        (dx,) = torch.autograd.grad(ours, x, dy)
        oracle.assert_input_gradient(dx, exact.grad, 3 * dy.double() / x_scale)


def _two_values(rows: Tensor) -> Tensor:
    return 1000 + 4 * (rows > 0).double()


def _first_is_an_outlier(rows: Tensor) -> Tensor:
    return torch.cat([torch.full_like(rows[:, :1], 3e4), rows[:, 1:]], 1)


def _one_differs(rows: Tensor) -> Tensor:
    return torch.cat([torch.full_like(rows[:, 1:], 1000), torch.full_like(rows[:, :1], 1008)], 1)


@pytest.mark.parametrize("width", [33, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("made", [_two_values, _first_is_an_outlier, _one_differs])
def test_layer_norm_of_a_large_mean_in_16_bits(
    made: Callable[[Tensor], Tensor], dtype: torch.dtype, width: int
) -> None:
    """The spread of such rows is small compared with their mean, or with the first element, at which sums may start."""
    x = made(torch.randn(6, width, dtype=torch.float64)).to(dtype)
    dy, weight, bias = (torch.randn(size).to(dtype) for size in ((6, width), (width,), (width,)))
    assert max(exactness.layer_norm(x, weight, bias, dy).values()) <= 1
