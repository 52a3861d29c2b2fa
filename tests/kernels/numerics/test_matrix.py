"""Forward and gradients against float64 over dtypes, widths, leading dimensions, gains and layouts."""

import itertools

import pytest
import torch
from helpers import oracle
from helpers.norm_checks import DTYPES, check_layer_norm, check_rms_norm, check_two_steps, sampled, spread
from torch import Tensor

from omninorm import functional

WIDTHS = [1, 2, 3, 7, 64, 65, 127, 768, 5120]
LEADING = [(), (3,), (2, 3), (2, 1, 3), (2, 1, 2, 2), (0,), (2, 0, 3)]
# Quick: every dtype with every width at one shape, and every shape at one width.
CASES = sampled(
    itertools.product(DTYPES, WIDTHS, LEADING),
    lambda dtype, width, leading: leading == (2, 3) or (width == 65 and dtype == torch.float32),
)


@pytest.mark.parametrize(("dtype", "width", "leading"), CASES, ids=str)
def test_rms_norm(dtype: torch.dtype, width: int, leading: tuple[int, ...]) -> None:
    x, dy = spread(*leading, width, dtype=dtype), spread(*leading, width, dtype=dtype)
    check_rms_norm(x, torch.randn(width, dtype=dtype), dy)


@pytest.mark.parametrize(("dtype", "width", "leading"), CASES, ids=str)
def test_layer_norm(dtype: torch.dtype, width: int, leading: tuple[int, ...]) -> None:
    x, dy = spread(*leading, width, dtype=dtype), spread(*leading, width, dtype=dtype)
    check_layer_norm(x, torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype), dy)


GAIN_DTYPES = [None, *DTYPES]


@pytest.mark.parametrize(("dtype", "gain_dtype"), list(itertools.product(DTYPES, GAIN_DTYPES)), ids=str)
def test_gains_of_every_dtype(dtype: torch.dtype, gain_dtype: torch.dtype | None) -> None:
    """A float64 gain on a narrower input counts as what the compute dtype holds of it, hence the rounding here."""

    def gain() -> Tensor | None:
        values = torch.randn(65, dtype=oracle.compute_dtype(dtype))
        return None if gain_dtype is None else values.to(gain_dtype)

    x, dy = spread(4, 5, 65, dtype=dtype), spread(4, 5, 65, dtype=dtype)
    check_rms_norm(x, gain(), dy)
    check_layer_norm(x, gain(), gain(), dy)
    check_layer_norm(x, gain(), None, dy)
    check_layer_norm(x, None, gain(), dy)


GAIN_LAYOUTS = {
    "strided": lambda gain: gain.repeat_interleave(2)[::2],
    "expanded": lambda gain: gain[:1].expand_as(gain),
    "offset by one": lambda gain: torch.cat((gain[:1], gain))[1:],
    "a column": lambda gain: gain[:, None].repeat(1, 3)[:, 1],
}


@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", GAIN_LAYOUTS)
def test_gains_of_any_strides(layout: str, dtype: torch.dtype, gain_dtype: torch.dtype) -> None:
    weight, bias = (GAIN_LAYOUTS[layout](torch.randn(65).to(gain_dtype)) for _ in range(2))
    x, dy = spread(5, 65, dtype=dtype), spread(5, 65, dtype=dtype)
    check_rms_norm(x, weight, dy)
    check_layer_norm(x, weight, bias, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gain_offset(dtype: torch.dtype) -> None:
    check_rms_norm(spread(6, 65, dtype=dtype), torch.randn(65, dtype=dtype), spread(6, 65, dtype=dtype), 1.0)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "features strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "features transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every second row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "offset by one": lambda x: torch.cat((x.flatten()[:1], x.flatten())).narrow(0, 1, x.numel()).view(x.shape),
    "reversed storage": lambda x: x.flip(0).as_strided(x.shape, x.stride()).flip(0),
    "expanded rows": lambda x: x[:, :1].expand_as(x),
    "expanded features": lambda x: x[..., :1].expand_as(x),
    "channels last": lambda x: x[None].to(memory_format=torch.channels_last)[0],
}


NAMES = list(LAYOUTS)
# Quick: each layout with itself in float32, and with the next one in bfloat16.
LAYOUT_CASES = sampled(
    itertools.product(NAMES, NAMES, [torch.float32, torch.bfloat16]),
    lambda of_x, of_dy, dtype: (NAMES.index(of_dy) - NAMES.index(of_x)) % len(NAMES) == (dtype == torch.bfloat16),
)


@pytest.mark.parametrize(("of_x", "of_dy", "dtype"), LAYOUT_CASES, ids=str)
def test_any_strides(of_x: str, of_dy: str, dtype: torch.dtype) -> None:
    """Inputs and output gradients of different layouts. Expanded features make constant rows: their LayerNorm is β
    and its dx is r times what the two means leave of g, which the terms' tolerance covers."""
    x, dy = LAYOUTS[of_x](spread(3, 4, 10, dtype=dtype)), LAYOUTS[of_dy](spread(3, 4, 10, dtype=dtype))
    dy = dy if dy.shape == x.shape else dy.transpose(0, 1)
    before = dy.clone()
    weight, bias = torch.randn(10), torch.randn(10)
    check_rms_norm(x, weight, dy)
    check_layer_norm(x, weight, bias, dy)
    assert torch.equal(dy, before), "the caller's gradient was written"


def test_the_sum_of_the_output_can_be_differentiated() -> None:
    """sum() hands back a gradient of stride 0."""
    x = spread(5, 8, dtype=torch.float32).requires_grad_()
    functional.layer_norm(x, torch.randn(8)).sum().backward()
    functional.rms_norm(x, torch.randn(8)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


RMS_OPTIONS = [{}, {"eps": 0.5}, {"gain_offset": 1.0}, {"cast": "llama"}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", RMS_OPTIONS, ids=str)
def test_add_rms_norm_is_the_two_steps_bit_for_bit(options, dtype: torch.dtype) -> None:
    check_two_steps(functional.add_rms_norm, functional.rms_norm, 1, options, (4, 7, 33), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"eps": 0.5}], ids=str)
@pytest.mark.parametrize("gains", [0, 1, 2])
def test_add_layer_norm_is_the_two_steps_bit_for_bit(gains: int, options, dtype: torch.dtype) -> None:
    check_two_steps(functional.add_layer_norm, functional.layer_norm, gains, options, (4, 7, 33), dtype)


@pytest.mark.parametrize("norm", [functional.rms_norm, functional.layer_norm])
def test_strided_rows_give_the_same_bits(norm) -> None:
    for width in (5, 64, 1000):
        x = torch.randn(40, width)
        assert torch.equal(norm(x.t().contiguous().t()), norm(x))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_second_derivatives(width: int) -> None:
    options = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias = torch.randn(3, 2, width, **options), torch.randn(width, **options), torch.randn(width, **options)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight, 1e-2, gain_offset=0.5)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x, weight, bias, 1e-2)

    assert torch.autograd.gradcheck(rms, (x, weight))
    assert torch.autograd.gradgradcheck(rms, (x, weight))
    assert torch.autograd.gradcheck(layer, (x, weight, bias))
    assert torch.autograd.gradgradcheck(layer, (x, weight, bias))
    assert torch.autograd.gradgradcheck(functional.rms_norm, (x,))


def test_second_derivatives_of_the_add_variants() -> None:
    options = {"dtype": torch.float64, "requires_grad": True}
    x, residual = torch.randn(3, 5, **options), torch.randn(3, 5, **options)
    weight, bias = torch.randn(5, **options), torch.randn(5, **options)
    assert torch.autograd.gradgradcheck(functional.add_rms_norm, (x, residual, weight))
    assert torch.autograd.gradgradcheck(functional.add_layer_norm, (x, residual, weight, bias))


def test_second_derivative_at_zero() -> None:
    """Near 0 the norms are x/√ε, so the curvature is 0 and the derivative of dx along dy is 1/√ε."""
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    dy = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(functional.rms_norm(x, eps=1e-4), x, dy, create_graph=True)
    d2x, ddy = torch.autograd.grad(dx.sum(), (x, dy))
    assert torch.equal(d2x, torch.zeros_like(x))
    torch.testing.assert_close(ddy, torch.full_like(dy, 100.0))


@pytest.mark.parametrize("gradients", list(itertools.product([True, False], repeat=3)), ids=str)
def test_any_subset_of_gradients(gradients: tuple[bool, bool, bool]) -> None:
    x, weight, bias = (torch.randn(shape) for shape in [(3, 8), (8,), (8,)])
    required = [t.requires_grad_(flag) for t, flag in zip((x, weight, bias), gradients, strict=True)]
    y = functional.layer_norm(x, weight, bias) + functional.rms_norm(x, weight)
    assert y.requires_grad == any(gradients)
    if any(gradients):
        y.sum().backward()
    for tensor, flag in zip(required, gradients, strict=True):
        assert (tensor.grad is not None) == flag


@pytest.mark.parametrize("frozen", ["x", "residual", "weight", "bias"])
def test_a_frozen_input_leaves_the_other_gradients_as_they_are(frozen: str) -> None:
    shapes = {"x": (5, 33), "residual": (5, 33), "weight": (33,), "bias": (33,)}
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    along = torch.randn(5, 33), torch.randn(5, 33)
    for norm, names in [
        (functional.add_rms_norm, ["x", "residual", "weight"]),
        (functional.add_layer_norm, ["x", "residual", "weight", "bias"]),
    ]:
        required = [name for name in names if name != frozen]
        some = {name: values[name].clone().requires_grad_(name != frozen) for name in names}
        all_of_them = {name: values[name].clone().requires_grad_() for name in names}
        ours = torch.autograd.grad(norm(**some), [some[name] for name in required], along)
        theirs = torch.autograd.grad(norm(**all_of_them), [all_of_them[name] for name in required], along)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_x_and_the_row_statistics_are_saved_for_backward(dtype: torch.dtype) -> None:
    """The input itself, no copy, the gains, and at most one number of the compute dtype a row (two for LayerNorm)."""
    x = torch.randn(16, 32).to(dtype).requires_grad_()
    weight, bias = torch.randn(32, requires_grad=True), torch.randn(32, requires_grad=True)
    number = torch.finfo(oracle.compute_dtype(dtype)).bits // 8
    for norm, gains, allowed in [(functional.rms_norm, [weight], 1), (functional.layer_norm, [weight, bias], 2)]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            norm(x, *gains)
        known = {t.data_ptr() for t in (x, *gains)}
        assert x.data_ptr() in {t.data_ptr() for t in kept}
        more = [t for t in kept if t.data_ptr() not in known]
        assert sum(t.numel() * t.element_size() for t in more) <= allowed * number * 16
