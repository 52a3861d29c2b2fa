"""The remainder after the best gain, in cases that can be computed manually; and operation counts."""

import math

import pytest
import torch
from torch import nn

from omninorm.experiments.compare.protocols.operations import count_operations
from omninorm.experiments.compare.protocols.undo import measure_undo, remainder


def rows(*sizes: float, width: int = 64) -> torch.Tensor:
    """Rows of ±1, each times its size: their RMS is the size, and RMSNorm gives back the signs."""
    signs = torch.randint(0, 2, (len(sizes), width), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    return signs * torch.tensor(sizes, dtype=torch.float64)[:, None]


def test_rows_of_equal_size_are_undone_exactly() -> None:
    assert remainder(rows(3.0, 3.0, 3.0), centred=False, eps=0.0) < 1e-24


def test_rows_of_unequal_size_leave_their_variance() -> None:
    """The best γ is the mean size m: what is left is the sizes' variance over their mean square, here ((1−2)² + (3−2)²)/2
    over (1 + 9)/2."""
    assert remainder(rows(1.0, 3.0), centred=False, eps=0.0) == pytest.approx(1 / 5)


def test_layer_norm_is_undone_with_its_bias() -> None:
    """Rows that are one shape, shifted alike and scaled alike, are undone by γ and β; scaled differently they are not."""
    shape = torch.linspace(-1, 1, 32, dtype=torch.float64)
    alike = torch.stack([shape.roll(k) * 2 + 5 for k in range(4)])
    assert remainder(alike, centred=True, eps=0.0) < 1e-20
    unlike = torch.stack([shape.roll(k) * 2**k + 5 for k in range(4)])
    assert remainder(unlike, centred=True, eps=0.0) > 0.01


def test_the_models_own_gain_is_measured() -> None:
    """Tokens of RMS 2 through RMSNorm: with γ = 1 half of each is left, a quarter of its square; with γ = 2 nothing."""
    table = nn.Embedding.from_pretrained(rows(*[2.0] * 8).float())
    norm = nn.RMSNorm(64, eps=0.0)
    model = nn.Sequential(table, norm)
    tokens = torch.arange(8).view(2, 4)
    found = measure_undo(model, tokens)
    assert found == {"best": pytest.approx(0, abs=1e-10), "learned": pytest.approx(0.25, rel=1e-5)}
    nn.init.constant_(norm.weight, 2.0)
    assert measure_undo(model, tokens)["learned"] == pytest.approx(0, abs=1e-10)
    assert measure_undo(nn.Sequential(table, nn.Identity()), tokens) is None
    assert not norm._forward_hooks


def test_operation_counts_match_counting_by_hand() -> None:
    """RMSNorm: square, add, times r, times γ. LayerNorm: add (mean); subtract, square, add (variance); subtract, times r,
    times γ, plus β."""
    assert count_operations("rmsnorm")["per_element"] == 4
    assert count_operations("layernorm")["per_element"] == 8
    assert all(math.isfinite(count_operations(kind)["per_row"]) for kind in ("rmsnorm", "layernorm"))
