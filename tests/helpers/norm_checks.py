"""Checks of a norm's results and gradients against the oracle, for every implementation, and choices of test cases."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import exactness
from torch import Tensor

from omninorm.kernels import gpu

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
# Rows for tests of long sums: 256 blocks of 512 rows each; `exhaustive`, a million. Triton's interpreter has time for
# 128 blocks of a gain's gradient.
MANY_ROWS = [2**13] if gpu.INTERPRETED else [2**17, pytest.param(2**20, marks=pytest.mark.exhaustive)]


def sampled(cases: Iterable[tuple[Any, ...]], is_quick: Callable[..., bool]) -> list[Any]:
    """Return the cases for pytest.mark.parametrize, those that are not quick with the mark `exhaustive`."""
    return [pytest.param(*case, marks=() if is_quick(*case) else pytest.mark.exhaustive) for case in cases]


def on_threads(run: Callable[[], list[Tensor]], counts: Iterable[int]) -> list[list[Tensor]]:
    """Return the results of `run` for each of these numbers of threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


def spread(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return random rows whose means are not 0 and whose sizes differ."""
    x = torch.randn(shape, dtype=torch.float64)
    rows = torch.exp(torch.randn(*shape[:-1], 1, dtype=torch.float64)) if shape[:-1] else 3.0
    return (x * rows + 0.3).to(dtype)


def check_rms_norm(x: Tensor, weight: Tensor | None, dy: Tensor, gain_offset: float = 0.0) -> None:
    _check(exactness.rms_norm(x, weight, dy, gain_offset))


def check_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> None:
    _check(exactness.layer_norm(x, weight, bias, dy))


def _check(shares: dict[str, float]) -> None:
    for name, share in shares.items():
        assert share <= 1, f"{share:.3g} × the allowed error of {name}"


def check_two_steps(add_norm, norm, gains: int, options, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compare an add variant with the addition and the norm, bit for bit.

    This includes both results, and the gradients of losses that depend on both, on the normalized result alone and on
    the sum alone."""
    x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    leaves = [x, residual, *(torch.randn(shape[-1]).to(dtype).requires_grad_() for _ in range(gains))]
    ours = add_norm(*leaves, **options)
    total = x + residual
    theirs = norm(total, *leaves[2:], **options), total
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"results differ at {shape}"
    along = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for used in (slice(0, 2), slice(0, 1), slice(1, 2)):
        gradients = (
            torch.autograd.grad(results[used], leaves, along[used], retain_graph=True, allow_unused=True)
            for results in (ours, theirs)
        )
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None), f"one gradient is missing at {shape}"
            assert a is None or torch.equal(a, b), f"gradients differ at {shape}"
