"""Gated norms are swapped where GatedRMSNorm computes the same in the same order of rounding, and refused elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.gated_norms import CLASSES, WIDTH, theirs
from torch import Tensor, nn

from omninorm import GatedRMSNorm
from omninorm.surgery import swap_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", CLASSES)
def test_transformers_gated_norm_is_swapped_with_its_weight(model: str, dtype: torch.dtype) -> None:
    holder = nn.ModuleDict({"norm": theirs(model).to(dtype)})
    x, gate = torch.randn(2, 7, WIDTH).to(dtype), torch.randn(2, 7, WIDTH).to(dtype)
    before, weight = holder["norm"](x, gate), holder["norm"].weight
    report = swap_norms(holder)
    assert report.refused == {}
    ours = holder["norm"]
    assert isinstance(ours, GatedRMSNorm)
    assert ours.weight is weight
    expected = GatedRMSNorm(WIDTH, 1e-5, **CLASSES[model][2])
    # Llama's order has no effect without a rounding in between, so a float32 norm may be found as either.
    assert ours.extra_repr() == expected.extra_repr()
    y = ours(x, gate)
    assert y.dtype == dtype
    torch.testing.assert_close(y, before, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
    report.undo()
    assert torch.equal(holder["norm"](x, gate), before)


class Gated(nn.Module):
    """RMSNorm with a gate, with parts that subclasses change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.eps = 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.normed(x) * self.activate(gate)

    def normed(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)

    def activate(self, gate: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate)


class Tanh(Gated):
    def activate(self, gate: Tensor) -> Tensor:
        return gate.tanh()


class Offset(Gated):
    def normed(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (8,), 1 + self.weight, self.eps)


class Centered(Gated):
    def normed(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (8,), self.weight, None, self.eps)


class Fixed(Gated):
    def normed(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (8,), None, self.eps)


class OtherName(Gated):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, z)


class NotANorm(Gated):
    def normed(self, x: Tensor) -> Tensor:
        return x * self.weight


Gated.__name__ = "GatedNorm"  # reports mention only modules that are named like norms
REFUSED: dict[type[Gated], str] = {
    Tanh: "gated in a way",
    Offset: "not an RMSNorm with a plain gain",
    Centered: "not an RMSNorm with a plain gain",
    Fixed: "its gain is not its only parameter",
    OtherName: "its second argument is not named 'gate'",
    NotANorm: "it is no gated norm over features",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_gated_norm_is_refused_with_the_reason(kind: type[Gated]) -> None:
    kind.__name__ = f"{kind.__name__}Norm"
    holder = nn.ModuleDict({"norm": kind()})
    report = swap_norms(holder)
    assert report.changed == {}
    assert REFUSED[kind] in report.refused["norm"]
    assert type(holder["norm"]) is kind


def test_norm_that_rounds_its_activation_is_swapped_in_float32_only() -> None:
    wide, narrow = nn.ModuleDict({"norm": Gated()}), nn.ModuleDict({"norm": Gated().bfloat16()})
    assert swap_norms(wide).changed == {"norm": "GatedRMSNorm(8, eps=1e-06, activation='silu')"}
    refused = swap_norms(narrow).refused
    assert refused == {"norm": "in torch.bfloat16 it rounds in an order that omninorm does not have"}


def test_norm_with_a_residual_is_refused() -> None:
    class AddNorm(Gated):
        def forward(self, x: Tensor, residual: Tensor) -> Any:  # type: ignore[override]
            return self.normed(x + residual)

    report = swap_norms(nn.ModuleDict({"norm": AddNorm()}))
    assert report.refused["norm"] == "its forward also takes 'residual', which omninorm's norms do not"
