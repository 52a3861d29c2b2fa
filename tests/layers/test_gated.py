"""GatedRMSNorm beside transformers' gated norms: their state dicts, and their outputs bit for bit or to a rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import oracle
from torch import nn

import omninorm
from omninorm import GatedRMSNorm
from omninorm.errors import ConfigError, InputError

WIDTH, GROUP = 48, 12
LLAMA = {"cast": "llama"}
SIGMOID = {"activation": "sigmoid"}
MAMBA = {"norm_first": False, "groups": WIDTH // GROUP, "cast": "llama"}
# transformers' class by model, its arguments, and ours.
CLASSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextRMSNormGated", {}, LLAMA),
    "qwen3_5": ("Qwen3_5RMSNormGated", {}, LLAMA),
    "olmo_hybrid": ("OlmoHybridRMSNormGated", {}, LLAMA),
    "mamba2": ("MambaRMSNormGated", {"group_size": GROUP}, MAMBA),
    "zamba2": ("Zamba2RMSNormGated", {"group_size": GROUP}, MAMBA),
    "nemotron_h": ("NemotronHRMSNormGated", {"group_size": GROUP}, MAMBA),
    "granitemoehybrid": ("GraniteMoeHybridRMSNormGated", {"group_size": GROUP}, MAMBA),
    "falcon_h1": ("FalconH1RMSNormGated", {"n_groups": 4, "norm_before_gate": False}, {**MAMBA, "cast": "fp32"}),
    "kimi_linear": ("KimiLinearRMSNormGated", {}, SIGMOID),
    "bailing_hybrid": ("BailingHybridRMSNormGated", {}, SIGMOID),
}


def both(model: str, dtype: torch.dtype) -> tuple[nn.Module, GatedRMSNorm]:
    name, theirs, ours = CLASSES[model]
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    peer = getattr(module, name)(WIDTH, eps=1e-5, **theirs)
    with torch.no_grad():
        peer.weight.uniform_(0.5, 1.5)
    peer = peer.to(dtype)
    norm = GatedRMSNorm(WIDTH, 1e-5, dtype=dtype, **ours)
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
