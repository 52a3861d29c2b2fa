"""GatedRMSNorm beside transformers' gated norms: their state dicts, and their outputs bit for bit or to a rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import oracle
from helpers.gated_norms import CLASSES, WIDTH, theirs
from torch import nn

import omninorm
from omninorm import GatedRMSNorm
from omninorm.errors import ConfigError, InputError


def both(model: str, dtype: torch.dtype) -> tuple[nn.Module, GatedRMSNorm]:
    peer = theirs(model).to(dtype)
    norm = GatedRMSNorm(WIDTH, 1e-5, dtype=dtype, **CLASSES[model][2])
    norm.load_state_dict(peer.state_dict())
    return peer, norm


@pytest.mark.parametrize("model", CLASSES)
def test_it_computes_what_transformers_computes_in_float32(model: str) -> None:
    peer, norm = both(model, torch.float32)
    x, z = torch.randn(2, 7, WIDTH), torch.randn(2, 7, WIDTH)
    oracle.assert_forward(norm(x, z), peer.double()(x.double(), z.double()).double())


@pytest.mark.parametrize("model", CLASSES)
def test_it_rounds_where_transformers_rounds_in_bfloat16(model: str) -> None:
    """Statistics are summed in another order, so x̂ may differ in its last bit in float32, and rarely be rounded the
    other way."""
    peer, norm = both(model, torch.bfloat16)
    x, z = torch.randn(64, 7, WIDTH).bfloat16(), torch.randn(64, 7, WIDTH).bfloat16()
    y, expected = norm(x, z), peer(x, z)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert (y == expected).float().mean() > 0.999
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("model", ["qwen3_next", "kimi_linear"])
def test_a_float32_gain_of_bfloat16_input_is_rounded_where_transformers_rounds(model: str) -> None:
    peer, norm = both(model, torch.float32)
    x, z = torch.randn(64, 7, WIDTH).bfloat16(), torch.randn(64, 7, WIDTH).bfloat16()
    y, expected = norm(x, z), peer(x, z)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert (y == expected).float().mean() > 0.999


def test_without_a_gate_it_is_the_norm_of_its_groups() -> None:
    peer, norm = both("mamba2", torch.float32)
    x = torch.randn(2, 7, WIDTH)
    oracle.assert_forward(norm(x), peer.double()(x.double()).double())


def test_it_is_public_and_weight_decay_leaves_its_gain_alone() -> None:
    assert omninorm.GatedRMSNorm is GatedRMSNorm
    groups = omninorm.param_groups(nn.Sequential(GatedRMSNorm(4)), weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_it_prints_its_settings() -> None:
    assert str(GatedRMSNorm(4)) == "GatedRMSNorm(4, eps=1e-06, activation='silu')"
    printed = "GatedRMSNorm(4, eps=1e-06, activation='sigmoid', norm_first=False, groups=2, cast='llama')"
    assert str(GatedRMSNorm(4, activation="sigmoid", norm_first=False, groups=2, cast="llama")) == printed


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"groups": 5}, "groups must divide the 48 features"),
        ({"groups": 0}, "groups"),
        ({"activation": "gelu"}, "activation"),
        ({"norm_first": 1}, "norm_first must be True or False"),
        ({"cast": "bf16"}, "cast"),
        ({"eps": -1.0}, "eps"),
        ({"gate": "silu"}, "GatedRMSNorm takes the arguments"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        GatedRMSNorm(WIDTH, **settings)


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match="shape ends in 4"):
        GatedRMSNorm(4)(torch.ones(2, 5), torch.ones(2, 5))
