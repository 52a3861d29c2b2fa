"""Identifies linear layers and embeddings, and the orientation of their weights, by probing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Enough to tell W from its transpose, whatever the dtype's rounding.
_CLOSE = 0.05


@dataclass(frozen=True)
class LinearMap:
    """A module y = W x + b, or an embedding, which writes rows of its weight.

    Args:
        module: with the parameters `weight` and perhaps `bias`.
        inputs, outputs: features; an embedding's inputs are None.
        transposed: whether the weight is stored as (inputs, outputs), as embeddings and GPT-2's Conv1D are.
    """

    module: nn.Module
    inputs: int | None
    outputs: int
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.module._parameters.get("bias")


def read_linear(module: nn.Module) -> LinearMap | None:
    """Return the linear map that a module computes, or None if it is not a plain linear layer or embedding."""
    if isinstance(streamed := getattr(module, "map", None), LinearMap):
        return streamed
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    named = {name for name, value in module._parameters.items() if value is not None}
    if weight is None or weight.ndim != 2 or not named <= {"weight", "bias"} or any(True for _ in module.children()):
        return None
    if isinstance(module, nn.Embedding):
        # padding_idx only affects gradients: a padding token's row is written like any other.
        return LinearMap(module, None, weight.shape[1], True) if module.max_norm is None else None
    for transposed in (False, True):
        inputs, outputs = weight.shape if transposed else weight.shape[::-1]
        if bias is not None and bias.shape != (outputs,):
            continue
        x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
        x = x.to(weight.device)
        expected = x @ (weight if transposed else weight.T) + (0 if bias is None else bias)
        try:
            with torch.no_grad():
                y = module(x)
        except Exception:  # the other orientation, or not linear
            continue
        if isinstance(y, Tensor) and y.shape == expected.shape and _close(y, expected):
            return LinearMap(module, inputs, outputs, transposed)
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= _CLOSE * float(b.abs().max().clamp_min(1e-30))
