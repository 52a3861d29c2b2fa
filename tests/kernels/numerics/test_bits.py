"""Bit-stability: results do not depend on other rows, on the order of rows, or on the number of threads."""

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers.norm_checks import on_threads, sampled
from torch import Tensor

from omninorm import functional
from omninorm.kernels import gpu

NORMS = [functional.rms_norm, functional.layer_norm]
# Widths below and above the size at which PyTorch starts to use several threads.
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
@pytest.mark.parametrize("rows", sampled(zip(range(1, 10)), lambda rows: rows in (3, 4, 9)))
def test_a_row_alone_equals_the_row_in_any_group(norm: Callable[..., Tensor], rows: int) -> None:
    """The kernels differentiate rows four at a time and what is left singly."""
    for width, dtype in itertools.product((5, 64, 100), (torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        x, dy, weight = (torch.randn(shape).to(dtype) for shape in [(rows, width), (rows, width), (width,)])
        y, dx = with_gradient(norm, x, dy, weight)
        for row in range(rows):
            y_alone, dx_alone = with_gradient(norm, x[row], dy[row], weight)
            assert torch.equal(y_alone, y[row])
            assert torch.equal(dx_alone, dx[row])


def with_gradient(norm: Callable[..., Tensor], x: Tensor, dy: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x, weight)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_permuted_rows_give_permuted_results(norm: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, dy, weight = (torch.randn(shape).to(dtype) for shape in [(1001, 96), (1001, 96), (96,)])
    order = torch.randperm(1001)
    permuted = with_gradient(norm, x[order], dy[order], weight)
    for ours, expected in zip(permuted, with_gradient(norm, x, dy, weight), strict=True):
        assert torch.equal(ours, expected[order])


THREADS = (1, 2, 3, 4, 2)
# Gain gradients gather over blocks of at least 64 rows, of which there are 256 at most; a thread gets at least 32,768
# elements. The shapes have fewer, as many and more of both.
SHAPES = [(100_000, 1), (50_000, 3), (3000, 64), (1, 200_000), (7, 5000), (65, 2048), (16_385, 20)]
if gpu.INTERPRETED:  # the interpreter has one thread and is too slow for many rows
    THREADS, SHAPES = (1, 2), [(min(rows, 300), width) for rows, width in SHAPES]
CASES = [(shape, torch.float32) for shape in SHAPES] + [(shape, torch.bfloat16) for shape in SHAPES[-2:]]
QUICK = [
    (SHAPES[1], torch.float32),
    (SHAPES[3], torch.float32),
    (SHAPES[5], torch.float32),
    (SHAPES[6], torch.bfloat16),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "dtype"), sampled(CASES, lambda *case: case in QUICK), ids=str)
def test_every_number_of_threads_gives_the_same_bits(
    norm: Callable[..., Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, dy, gain = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1])
    gains = [gain] if norm is functional.rms_norm else [gain, gain]

    def run() -> list[Tensor]:
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *gains)]
        y = norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    first, *others = on_threads(run, THREADS)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
