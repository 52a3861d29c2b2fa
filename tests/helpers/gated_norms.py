"""The gated norms of transformers, and the settings of GatedRMSNorm that compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

WIDTH, GROUP = 48, 12
_LLAMA = {"cast": "llama"}
_SIGMOID = {"activation": "sigmoid"}
_MAMBA = {"norm_first": False, "groups": WIDTH // GROUP, "cast": "llama"}
# transformers' class by model, its arguments, and ours.
CLASSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextRMSNormGated", {}, _LLAMA),
    "qwen3_5": ("Qwen3_5RMSNormGated", {}, _LLAMA),
    "olmo_hybrid": ("OlmoHybridRMSNormGated", {}, _LLAMA),
    "mamba2": ("MambaRMSNormGated", {"group_size": GROUP}, _MAMBA),
    "zamba2": ("Zamba2RMSNormGated", {"group_size": GROUP}, _MAMBA),
    "nemotron_h": ("NemotronHRMSNormGated", {"group_size": GROUP}, _MAMBA),
    "granitemoehybrid": ("GraniteMoeHybridRMSNormGated", {"group_size": GROUP}, _MAMBA),
    "falcon_h1": ("FalconH1RMSNormGated", {"n_groups": 4, "norm_before_gate": False}, {**_MAMBA, "cast": "fp32"}),
    "kimi_linear": ("KimiLinearRMSNormGated", {}, _SIGMOID),
    "bailing_hybrid": ("BailingHybridRMSNormGated", {}, _SIGMOID),
}


def theirs(model: str) -> nn.Module:
    """transformers' norm with a random weight, in float32; the test is skipped where transformers has none."""
    name, arguments, _ = CLASSES[model]
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    norm: nn.Module = getattr(module, name)(WIDTH, eps=1e-5, **arguments)
    with torch.no_grad():
        norm.get_parameter("weight").uniform_(0.5, 1.5)
    return norm
