"""The functions for the processes of test_sharding.py. Each process has the whole input, so it knows the right result."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import oracle
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import omninorm
from omninorm import functional
from omninorm.errors import InputError

SHAPE = (4, 6, 32)
NORMS = {
    "rms_norm": (functional.rms_norm, 1, {}),
    "rms_norm of Gemma": (functional.rms_norm, 1, {"gain_offset": 1.0}),
    "rms_norm of Llama": (functional.rms_norm, 1, {"cast": "llama"}),
    "layer_norm": (functional.layer_norm, 2, {}),
    "rms_norm alone": (functional.rms_norm, 0, {}),
    "layer_norm alone": (functional.layer_norm, 0, {}),
}


def leaves(gains: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return x and gains, and dy, the same on every process."""
    generator = torch.Generator().manual_seed(1)
    shapes = [SHAPE, *[SHAPE[-1:]] * gains, SHAPE]
    *tensors, dy = (torch.randn(shape, generator=generator) for shape in shapes)
    return [(3 * tensors[0] + 1).to(dtype), *tensors[1:]], dy.to(dtype)


def distributed(tensors: list[Tensor], mesh: Any, placements: list[Any]) -> list[DTensor]:
    """Return x with these placements; gains are sharded if features are, otherwise replicated."""
    of_gains = [Shard(0) if each == Shard(2) else Replicate() for each in placements]
    x, *gains = (tensor.detach().clone() for tensor in tensors)
    made = [distribute_tensor(x, mesh, placements), *(distribute_tensor(gain, mesh, of_gains) for gain in gains)]
    return [tensor.requires_grad_() for tensor in made]


def close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= tolerance, f"{error:.2e}"


def sharded_norms(shape: tuple[int, ...], *every: list[Any]) -> None:
    mesh = init_device_mesh("cpu", shape)
    for placements in every:
        _sharded_norms(mesh, placements)


def _sharded_norms(mesh: Any, placements: list[Any]) -> None:
    whole_rows = Shard(2) not in placements
    for norm, gains, options in NORMS.values():
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
            plain, dy = leaves(gains, dtype)
            plain = [tensor.requires_grad_() for tensor in plain]
            expected = norm(*plain, **options)
            expected.backward(dy)
            ours = distributed(plain, mesh, placements)
            y = norm(*ours, **options)
            assert y.placements == tuple(placements)
            assert y.dtype == dtype
            y.backward(distribute_tensor(dy, mesh, placements))
            if whole_rows:
                assert torch.equal(y.full_tensor(), expected)
            close(y.full_tensor(), expected, tolerance)
            for tensor, one in zip(ours, plain, strict=True):
                assert not any(each.is_partial() for each in tensor.grad.placements), "it would not be summed"
                # Gains are float32, and so are the partial sums.
                close(tensor.grad.full_tensor(), one.grad, tolerance if one is plain[0] else max(tolerance, 1e-6))


def others() -> None:
    added_norms()
    pending_sums()
    hard_rows()
    refused()


def added_norms() -> None:
    """Check the residual addition and the norm in one call."""
    mesh = init_device_mesh("cpu", (2,))
    for norm, gains in ((functional.add_rms_norm, 1), (functional.add_layer_norm, 2)):
        (x, *rest), _ = leaves(gains, torch.float32)
        for placement in (Shard(1), Shard(2)):
            ours, *of_gains = distributed([x, *rest], mesh, [placement])
            y, total = norm(ours, ours, *of_gains)
            expected, sums = norm(x, x, *rest)
            close(y.full_tensor(), expected, 1e-6)
            assert torch.equal(total.full_tensor(), sums)


def pending_sums() -> None:
    """Check that partial sums are reduced before they are normalized."""
    mesh = init_device_mesh("cpu", (2,))
    (x, weight), _ = leaves(1, torch.float64)
    half = DTensor.from_local(x / 2, mesh, [Partial()])
    y = functional.rms_norm(half, distribute_tensor(weight, mesh, [Replicate()]))
    close(y.full_tensor(), functional.rms_norm(x, weight), 1e-14)


def hard_rows() -> None:
    """Compare rows whose sums of squares overflow, cancel or underflow with float64, with features on two processes."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(9, 32)
    x[0] *= 1e25
    x[1] *= 1e-25
    x[2] = 0.0
    x[3] = 1e4
    x[4] += 1e4
    x[5, :16] += 1e5  # the parts' means are far from each other
    x[6, 3] = 1e30
    x[7] = 3e38
    for eps in (1e-6, 1e-12):
        sharded = distribute_tensor(x, mesh, [Shard(1)])
        rms = functional.rms_norm(sharded, None, eps).full_tensor()
        oracle.assert_forward(rms, oracle.rms_norm(x.double(), None, oracle.rounded_eps(eps, x.dtype)))
        layer = functional.layer_norm(sharded, None, None, eps).full_tensor()
        oracle.assert_forward(layer, oracle.layer_norm(x.double(), None, None, oracle.rounded_eps(eps, x.dtype)))
        assert not layer[[2, 3, 7]].any()


def refused() -> None:
    mesh, twice = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    (x, weight), _ = leaves(1, torch.float32)
    rows = distribute_tensor(x, mesh, [Shard(1)])
    cases = [
        (
            lambda: functional.rms_norm(rows, weight),
            "weight of a distributed x must be a DTensor on x's mesh, got a Tensor",
        ),
        (
            lambda: functional.rms_norm(rows, distribute_tensor(weight, twice, [Replicate()] * 2)),
            "a DTensor on another mesh",
        ),
        (lambda: functional.layer_norm(distribute_tensor(x, twice, [Shard(2), Shard(2)])), "over one mesh dimension"),
        (
            lambda: functional.rms_norm(distribute_tensor(torch.ones(2, 5), mesh, [Shard(1)])),
            "5 features over 2 processes",
        ),
    ]
    for call, said in cases:
        with pytest.raises(InputError, match=re.escape(said)):
            call()


class FeedForward(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def parallel_styles() -> None:
    """Check PyTorch's own styles of tensor and sequence parallelism."""
    mesh = init_device_mesh("cpu", (2,))
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    for make in (omninorm.RMSNorm, omninorm.LayerNorm):
        one = FeedForward(make(32))
        for parameter in one.norm.parameters():
            nn.init.normal_(parameter)
        many = FeedForward(make(32))
        many.load_state_dict(one.state_dict())
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(many, mesh, plan)
        one(x).backward(dy)
        y = many(distribute_tensor(x, mesh, [Shard(1)]).to_local())
        y.backward(distribute_tensor(dy, mesh, [Shard(1)]).to_local())
        for (name, ours), expected in zip(many.named_parameters(), one.parameters(), strict=True):
            gradient = ours.grad
            assert not any(each.is_partial() for each in gradient.placements), name
            close(gradient.full_tensor(), expected.grad, 1e-6)
