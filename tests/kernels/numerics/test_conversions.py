"""Reading and writing of 16-bit dtypes, to the bit.

PyTorch's own addition is the standard: the add variants return x + residual, which the kernels read, widen, add, round
and write.
"""

import itertools

import pytest
import torch
from helpers import oracle
from torch import Tensor

from omninorm import functional

HALVES = [torch.bfloat16, torch.float16]
ADD_NORMS = [functional.add_rms_norm, functional.add_layer_norm]


def bits(x: Tensor) -> Tensor:
    """The bits of each element, the same for all NaN."""
    return torch.where(x.isnan(), torch.full_like(x, float("nan")), x).view(torch.int16)


def every_number(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 64, 128])
@pytest.mark.parametrize("add_norm", ADD_NORMS)
def test_every_number_is_read_and_written(add_norm, width: int, dtype: torch.dtype) -> None:
    """65,536 numbers, each plus 0 and plus −0, the only one that leaves −0 as it is. Width 3 is the rest of a row."""
    x = every_number(dtype)
    x = torch.cat((x, x[: -len(x) % width])).view(-1, width)
    for zero in (torch.zeros_like(x), -torch.zeros_like(x)):
        _, total = add_norm(x, zero)
        assert torch.equal(bits(total), bits(x + zero))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("add_norm", ADD_NORMS)
def test_sums_are_rounded_to_nearest_even(add_norm, dtype: torch.dtype) -> None:
    """Random bit patterns, and pairs that are close in size, so that ties, subnormals and overflow are among them."""
    x = every_number(dtype).repeat(16).view(-1, 64)
    near = (x.view(torch.int16) + torch.randint(-(2**12), 2**12, x.shape).to(torch.int16)).view(dtype)
    anything = torch.randint(-(2**15), 2**15, x.shape).to(torch.int16).view(dtype)
    for residual in (near, -near, anything):
        expected = x + residual
        _, total = add_norm(x, residual)
        assert torch.equal(bits(total), bits(expected))
    exact = x.double() + near.double()
    rounded_sums = (x + near).double() != exact
    assert (rounded_sums & exact.isfinite()).sum() > 10_000  # the test is about roundings


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_alone_in_its_row(dtype: torch.dtype) -> None:
    """Width 1: y = x/√(x² + ε), from the smallest subnormal to infinity."""
    x = every_number(dtype).view(-1, 1)
    for eps in (1e-6, 1.0):
        y = functional.rms_norm(x, eps=eps)
        expected = oracle.rms_norm(x.double(), None, oracle.rounded_eps(eps, dtype))
        assert torch.equal(y.isnan(), expected.isnan())
        defined = ~expected.isnan().squeeze(1)
        oracle.assert_forward(y[defined], expected[defined])


PAYLOADS = {
    "float32": torch.tensor([-1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32),
    "float64": torch.tensor([-1, 2**63 - 1], dtype=torch.int64).view(torch.float64),
    "bfloat16": torch.tensor([-1, 0x7FFF, 0x7F81], dtype=torch.int16).view(torch.bfloat16),
}


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("gain_dtype", PAYLOADS)
def test_a_gains_nan_of_any_payload_stays_nan(gain_dtype: str, dtype: torch.dtype) -> None:
    """Rounding a NaN whose bits are all ones as if it were a number would carry into the sign and make it 0 or −0."""
    for width, nan in itertools.product((1, 5, 64, 77), PAYLOADS[gain_dtype]):
        x, gain = torch.randn(5, width).to(dtype), nan.expand(width)
        results = [
            functional.rms_norm(x, gain),
            functional.rms_norm(x, gain, gain_offset=1.0),
            functional.rms_norm(x, gain, cast="llama"),
            functional.layer_norm(x, gain),
            functional.layer_norm(x, None, gain),
            functional.add_rms_norm(x, x, gain)[0],
            functional.add_layer_norm(x, x, None, gain)[0],
        ]
        assert all(y.isnan().all() for y in results)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_rows_nan_of_any_payload_stays_nan(dtype: torch.dtype) -> None:
    patterns = every_number(dtype)
    patterns = patterns[patterns.isnan()]
    for width in (1, 3, 64):
        x = torch.randn(len(patterns), width).to(dtype)
        x[:, -1] = patterns
        assert functional.rms_norm(x).isnan().all()
        assert functional.layer_norm(x).isnan().all()
        x, dy = torch.randn_like(x).requires_grad_(), x
        for norm in (functional.rms_norm, functional.layer_norm):
            (dx,) = torch.autograd.grad(norm(x), x, dy)
            assert dx.isnan().all()
