"""Widths up to several vectors and around the blocks that sums are taken in, and rows at any address."""

import pytest
import torch
from helpers.norm_checks import DTYPES, check_layer_norm, check_rms_norm, check_two_steps, spread
from torch import Tensor

from omninorm import functional

# The kernels sum 4 vectors at a time, and 8 such steps before the lanes move to a wider total. Vectors have 16, 32 or
# 64 bytes, so that these blocks have 128, 256 or 512 floats, and half as many doubles.
BLOCKS = (64, 128, 256, 512, 1024)
EVERY = [*range(1, 71), *(block + more for block in BLOCKS for more in (-1, 0, 1, 37))]
# Quick: the rest of a vector of 1 to 16 lanes, one more and one less than a few vectors, and the blocks' ends.
QUICK = [*range(1, 10), 15, 16, 17, 31, 33, 47, 63, 65, 70, 127, 129, 257, 293, 511, 1025]
WIDTHS = [QUICK, pytest.param(EVERY, marks=pytest.mark.exhaustive)]
all_widths = pytest.mark.parametrize("widths", WIDTHS, ids=["some", "every"])
# A group of four rows and one more, as gradients are taken.
ROWS = 5
QUICK_DTYPES = (torch.float32, torch.bfloat16)


@all_widths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_every_width(dtype: torch.dtype, widths: list[int]) -> None:
    for width in widths:
        x, dy = spread(ROWS, width, dtype=dtype), spread(ROWS, width, dtype=dtype)
        check_rms_norm(x, torch.randn(width, dtype=dtype), dy)


@all_widths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_every_width(dtype: torch.dtype, widths: list[int]) -> None:
    for width in widths:
        x, dy = spread(ROWS, width, dtype=dtype), spread(ROWS, width, dtype=dtype)
        check_layer_norm(x, torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype), dy)


@all_widths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", ["fp32", "llama"])
def test_add_rms_norm_of_every_width_is_the_two_steps(cast: str, dtype: torch.dtype, widths: list[int]) -> None:
    for width in widths:
        check_two_steps(functional.add_rms_norm, functional.rms_norm, 1, {"cast": cast}, (ROWS, width), dtype)


@all_widths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_layer_norm_of_every_width_is_the_two_steps(dtype: torch.dtype, widths: list[int]) -> None:
    for width in widths:
        check_two_steps(functional.add_layer_norm, functional.layer_norm, 2, {}, (ROWS, width), dtype)


@pytest.mark.parametrize(
    "dtype",
    [each if each in QUICK_DTYPES else pytest.param(each, marks=pytest.mark.exhaustive) for each in DTYPES],
    ids=str,
)
def test_rows_of_262144_features_and_their_gradients(dtype: torch.dtype) -> None:
    width = 262_144
    x, dy = spread(2, width, dtype=dtype), spread(2, width, dtype=dtype)
    check_rms_norm(x, torch.randn(width, dtype=dtype), dy)
    check_layer_norm(x, torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype), dy)


def off_by(elements: int, tensor: Tensor) -> Tensor:
    """The same values, starting that many elements after an aligned address."""
    moved = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)[elements:].view(tensor.shape)
    assert moved.data_ptr() % 64 == elements * tensor.element_size() % 64
    return moved.copy_(tensor)


NORMS = {
    "rms_norm": (functional.rms_norm, False, 1),
    "layer_norm": (functional.layer_norm, False, 2),
    "add_rms_norm": (functional.add_rms_norm, True, 1),
    "add_layer_norm": (functional.add_layer_norm, True, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_any_address_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    norm, add, gains = NORMS[name]
    for width in (1, 7, 32, 65, 300):
        rows = [torch.randn(ROWS, width).to(dtype) for _ in range(2 if add else 1)]
        leaves = [*rows, *(torch.randn(width).to(dtype) for _ in range(gains))]
        dy = [torch.randn(ROWS, width).to(dtype) for _ in rows]

        def run(start: int, leaves=leaves, dy=dy) -> list[Tensor]:
            leaves = [off_by(start, leaf).requires_grad_() for leaf in leaves]
            results = norm(*leaves)
            results = list(results) if add else [results]
            return results + list(torch.autograd.grad(results, leaves, [off_by(start, t) for t in dy]))

        aligned = run(0)
        for start in (1, 2, 3, 5):
            assert all(torch.equal(a, b) for a, b in zip(run(start), aligned, strict=True)), f"{width=} {start=}"
