"""Bit-stability: a row's result and a gain's gradient depend on nothing that stands around them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import omninorm
from omninorm import functional

NORMS = [functional.rms_norm, functional.layer_norm]
# Widths beside and beyond the size at which PyTorch starts to use several threads.
WIDTHS = [1, 3, 64, 65, 1000, 40_000, 262_144]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_alone_equals_the_row_in_a_batch(norm: Callable[..., Tensor], width: int, dtype: torch.dtype) -> None:
    x, dy = torch.randn(5, width).to(dtype).requires_grad_(), torch.randn(5, width).to(dtype)
    y = norm(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    for row in range(5):
        alone = x[row].detach().clone().requires_grad_()
        y_alone = norm(alone)
        (dx_alone,) = torch.autograd.grad(y_alone, alone, dy[row])
        assert torch.equal(y_alone, y[row])
        assert torch.equal(dx_alone, dx[row])


@pytest.mark.parametrize("norm", NORMS)
def test_permuted_rows_give_permuted_results(norm: Callable[..., Tensor]) -> None:
    x = torch.randn(1000, 96)
    order = torch.randperm(1000)
    assert torch.equal(norm(x[order]), norm(x)[order])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(100_000, 1), (50_000, 3), (3000, 64), (1, 200_000), (7, 5000)], ids=str)
def test_every_number_of_threads_gives_the_same_bits(norm: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    x, dy, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    threads = torch.get_num_threads()
    try:
        results = [run(count) for count in (1, 2, 3, 4, 2)]
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)


RELATIVES = [omninorm.CRMSNorm, omninorm.ScaleNorm, omninorm.DynamicTanh, omninorm.DynamicErf]


@pytest.mark.parametrize("norm_type", RELATIVES)
@pytest.mark.parametrize("shape", [(1000, 1000), (100_000, 2), (3, 20_000)], ids=str)
def test_the_relatives_gradients_have_the_same_bits_too(norm_type, shape: tuple[int, int]) -> None:
    """Up to 32,767 features: the last step of a single scale's gradient is PyTorch's own sum over features."""
    x, dy = torch.randn(shape), torch.randn(shape)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        norm = norm_type(shape[-1])
        return list(torch.autograd.grad(norm(x), list(norm.parameters()), dy))

    threads = torch.get_num_threads()
    try:
        results = [run(count) for count in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
