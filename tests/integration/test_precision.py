"""Autocast: 16 bits in, 16 bits out, gains stay float32, nothing is cast outside of the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import omninorm
from omninorm import functional


class Casts(TorchDispatchMode):
    """Counts the casts, of operations that are really run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_to_copy", "aten::to", "aten::copy_"):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [omninorm.RMSNorm, omninorm.LayerNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(make: type[nn.Module], dtype: torch.dtype) -> None:
    norm = make(32)
    x, dy = torch.randn(6, 32).to(dtype).requires_grad_(), torch.randn(6, 32).to(dtype)
    with Casts() as casts, torch.autocast("cpu", dtype=dtype):
        y = norm(x)
        y.backward(dy)
    assert casts.found == []
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert {parameter.dtype for parameter in norm.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in norm.parameters()} == {torch.float32}
    outside = norm(x)
    assert torch.equal(y, outside), "autocast changes no bit"


@pytest.mark.parametrize("make", [omninorm.RMSNorm, omninorm.LayerNorm])
def test_a_float32_stream_stays_float32(make: type[nn.Module]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = make(32)(torch.randn(6, 32))
    assert y.dtype == torch.float32


@pytest.mark.parametrize("make", [omninorm.RMSNorm, omninorm.LayerNorm])
def test_a_linear_layer_behind_a_norm_in_autocast(make: type[nn.Module]) -> None:
    """The layer casts its input, as it does after any norm."""
    model = nn.Sequential(make(32), nn.Linear(32, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(6, 32).bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def squared(norm: Any) -> Any:
    return lambda x, *gains: norm(x, *gains).square().sum()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on its first tangent
@pytest.mark.parametrize(("norm", "gains"), [(functional.rms_norm, 1), (functional.layer_norm, 2)])
def test_transforms(norm: Any, gains: int) -> None:
    """torch.func: per-sample gradients by vmap of grad, and a Hessian by forward over reverse mode, against autograd."""
    x = torch.randn(5, 8, dtype=torch.float64)
    tensors: list[Tensor] = [torch.randn(8, dtype=torch.float64) for _ in range(gains)]
    each = torch.func.vmap(torch.func.grad(squared(norm), argnums=1), in_dims=(0, *[None] * gains))(x, *tensors)
    for row, ours in zip(x, each, strict=True):
        weight = tensors[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(squared(norm)(row, weight, *tensors[1:]), weight)
        torch.testing.assert_close(ours, expected)
    batched = torch.func.vmap(norm, in_dims=(0, *[None] * gains))(x, *tensors)
    torch.testing.assert_close(batched, norm(x, *tensors))
    row = x[0]
    hessian = torch.func.jacfwd(torch.func.grad(squared(norm)))(row, *tensors)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda x: squared(norm)(x, *tensors), row))
