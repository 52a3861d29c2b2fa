"""Batch invariance: a row's result and input gradient have the same bits alone and in every batch.

numerics/test_bits.py shows it for more shapes on the reference, the C++ operators and Triton's interpreter.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import omninorm
from omninorm import functional
from omninorm.kernels import cpu, gpu

ROWS, WIDTH = 37, 200
NORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "RMSNorm": lambda x, gain: functional.rms_norm(x, gain),
    "Llama's order": lambda x, gain: functional.rms_norm(x, gain, cast="llama"),
    "Gemma's offset": lambda x, gain: functional.rms_norm(x, gain, gain_offset=1.0),
    "LayerNorm": lambda x, gain: functional.layer_norm(x, gain, gain),
    "RMSNorm after an addition": lambda x, gain: functional.add_rms_norm(x, x.flip(-1), gain)[0],
    "LayerNorm after an addition": lambda x, gain: functional.add_layer_norm(x, x.flip(-1), gain)[0],
}
# With a GPU, Triton's kernels compute its tensors; without one, Triton's interpreter if TRITON_INTERPRET=1.
ON_GPU = torch.cuda.is_available()
BACKENDS = ["reference", *(["cpu"] if not cpu.unavailable() else [])]
if ON_GPU or gpu.INTERPRETED:
    BACKENDS = ["reference", "triton"]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of the tensors that a back end computes inside the test."""
    with omninorm.use_backend(request.param):
        yield "cuda" if ON_GPU else "cpu"


def results(
    norm: Callable[[Tensor, Tensor], Any], x: Tensor, dy: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, dx and dγ."""
    x, gain = x.clone().requires_grad_(), gain.clone().requires_grad_()
    y = norm(x, gain)
    return y.detach(), *torch.autograd.grad(y, (x, gain), dy)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_row_has_the_same_bits_in_every_batch(device: str, name: str, dtype: torch.dtype) -> None:
    x, dy, gain = (torch.randn(shape, device=device).to(dtype) for shape in [(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,)])
    y, dx, _ = results(NORMS[name], x, dy, gain)
    for batch in (slice(0, 1), slice(11, 12), slice(0, 2), slice(5, 21), slice(30, 37)):
        y_part, dx_part, _ = results(NORMS[name], x[batch], dy[batch], gain)
        assert torch.equal(y_part, y[batch])
        assert torch.equal(dx_part, dx[batch])


@pytest.mark.parametrize("name", NORMS)
def test_row_has_the_same_bits_among_other_rows(device: str, name: str) -> None:
    """Other rows of the batch may hold anything, even NaN."""
    x, dy = (torch.randn(ROWS, WIDTH, device=device).bfloat16() for _ in range(2))
    gain = torch.randn(WIDTH, device=device).bfloat16()
    others = x.clone()
    others[1:] = torch.nan
    ours, theirs = results(NORMS[name], x, dy, gain), results(NORMS[name], others, dy, gain)
    assert torch.equal(ours[0][0], theirs[0][0])
    assert torch.equal(ours[1][0], theirs[1][0])


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_gain_gradient_repeats_its_bits_for_the_same_batch(device: str, name: str) -> None:
    """It is a sum over the batch, so another batch or another order gives another sum, to within rounding."""
    x, dy = (torch.randn(ROWS, WIDTH, device=device) for _ in range(2))
    gain = torch.randn(WIDTH, device=device)
    first, again = (results(NORMS[name], x, dy, gain)[2] for _ in range(2))
    assert torch.equal(first, again)
    order = torch.randperm(ROWS, device=device)
    torch.testing.assert_close(results(NORMS[name], x[order], dy[order], gain)[2], first, rtol=1e-5, atol=1e-5)


def test_gain_gradients_of_parts_sum_to_that_of_the_batch(device: str) -> None:
    x, dy = (torch.randn(ROWS, WIDTH, device=device) for _ in range(2))
    gain = torch.randn(WIDTH, device=device)
    parts = [results(NORMS["RMSNorm"], x[part], dy[part], gain)[2] for part in (slice(0, 10), slice(10, ROWS))]
    torch.testing.assert_close(sum(parts), results(NORMS["RMSNorm"], x, dy, gain)[2], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="PyTorch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_row_has_the_same_bits_in_every_batch_by_pytorchs_kernels(name: str, dtype: torch.dtype) -> None:
    """PyTorch does not promise it; its kernels for GPUs compute each row in one block."""
    x, dy, gain = (torch.randn(shape, device="cuda").to(dtype) for shape in [(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,)])
    with omninorm.use_backend("torch"):
        y, dx, _ = results(NORMS[name], x, dy, gain)
        for batch in (slice(0, 1), slice(11, 12), slice(5, 21)):
            y_part, dx_part, _ = results(NORMS[name], x[batch], dy[batch], gain)
            assert torch.equal(y_part, y[batch])
            assert torch.equal(dx_part, dx[batch])
