"""Properties of the formulas for arbitrary inputs, by hypothesis."""

import hypothesis.strategies as st
import torch
from helpers import oracle
from hypothesis import given, settings
from torch import Tensor

from omninorm import functional

settings.register_profile("omninorm", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("omninorm")

POWERS_OF_TWO = st.integers(-60, 60).map(lambda exponent: 2.0**exponent)
SCALES = st.floats(1e-3, 1e3)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """(rows, width) float32, of any finite values up to 1e6."""
    count, width = draw(st.integers(1, 4)), draw(st.integers(2, 20))
    numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
    flat = draw(st.lists(numbers, min_size=count * width, max_size=count * width))
    return torch.tensor(flat).reshape(count, width)


def noise(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


NOISE = st.builds(noise, st.integers(1, 5), st.integers(2, 200), st.integers(0, 2**30))


@given(x=NOISE, scale=POWERS_OF_TWO)
def test_without_eps_rms_norm_ignores_a_power_of_two_to_the_bit(x: Tensor, scale: float) -> None:
    assert torch.equal(functional.rms_norm(x * scale, eps=0.0), functional.rms_norm(x, eps=0.0))


@given(x=NOISE, scale=SCALES)
def test_without_eps_rms_norm_ignores_scale(x: Tensor, scale: float) -> None:
    """x·scale is rounded, by half an ulp an element: one part in 2²⁴ of y, and four ulp for each of the two results."""
    expected = functional.rms_norm(x, eps=0.0)
    allowed = 9 * oracle.ulp(oracle.row_max(expected), torch.float32)
    assert ((functional.rms_norm(x * scale, eps=0.0) - expected).abs() <= allowed).all()


@given(x=NOISE, scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_layer_norm_ignores_shift_and_scale_up_to_eps(x: Tensor, scale: float, shift: float) -> None:
    """In float64, where rounding is out of sight: what remains is ε's share, ε/(2 var) of y at the most."""
    x = x.double()
    eps = 1e-6
    expected = functional.layer_norm(x, eps=eps)
    y = functional.layer_norm(x * scale + shift, eps=eps)
    var = x.var(-1, correction=0, keepdim=True)
    share = 0.5 * eps * (1 / var + 1 / (var * scale**2))
    rounding = 1e-13 * (1 + (x.abs().amax(-1, keepdim=True) + abs(shift) / scale) / var.sqrt())
    assert ((y - expected).abs() <= (share + rounding) * oracle.row_max(expected)).all()


@given(x=rows(), other=rows(), place=st.integers(0, 4))
def test_rows_are_independent(x: Tensor, other: Tensor, place: int) -> None:
    width = min(x.shape[1], other.shape[1])
    x, other = x[:, :width].contiguous(), other[:, :width].contiguous()
    place = min(place, len(x))
    together = torch.cat((x[:place], other, x[place:]))
    kept = [*range(place), *range(place + len(other), len(together))]
    for norm in (functional.rms_norm, functional.layer_norm):
        assert torch.equal(norm(together)[kept], norm(x))


@given(x=rows(), seed=st.integers(0, 1000))
def test_rows_may_be_permuted(x: Tensor, seed: int) -> None:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for norm in (functional.rms_norm, functional.layer_norm):
        assert torch.equal(norm(x[order]), norm(x)[order])


@given(x=rows())
def test_outputs_have_unit_scale(x: Tensor) -> None:
    """mean(y²) = m/(m + ε) ≤ 1, and LayerNorm's mean is 0; both to float32's rounding."""
    y = functional.rms_norm(x).double()
    square = x.double().square().mean(-1)
    torch.testing.assert_close(y.square().mean(-1), square / (square + 1e-6), rtol=1e-6, atol=1e-12)
    z = functional.layer_norm(x).double()
    assert (z.mean(-1).abs() <= 1e-6).all()
    assert (z.square().mean(-1) <= 1 + 1e-6).all()


@given(x=rows())
def test_every_finite_input_matches_float64(x: Tensor) -> None:
    eps = oracle.rounded_eps(1e-6, torch.float32)
    oracle.assert_forward(functional.rms_norm(x), oracle.rms_norm(x.double(), None, eps))
    oracle.assert_forward(functional.layer_norm(x), oracle.layer_norm(x.double(), None, None, eps))


@given(x=NOISE)
def test_the_gradient_is_orthogonal_to_the_input_without_eps(x: Tensor) -> None:
    """Scale invariance, differentiated: ⟨dx, x⟩ = 0 (Euler)."""
    x = x.double().requires_grad_()
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(functional.rms_norm(x, eps=0.0), x, dy)
    size = (dx.abs() * x.abs()).sum(-1) + dy.abs().sum(-1)
    assert ((dx * x).sum(-1).abs() <= 1e-12 * size).all()
