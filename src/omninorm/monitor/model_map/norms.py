"""Recognizes norms of any library and measures their properties.

A norm is a leaf module with one gain per feature. Whether it subtracts the mean, and whether its gain is stored as
γ − 1, is measured on small vectors unless its class determines it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from omninorm.layers import NORM_TYPES
from omninorm.layers.pointwise import Pointwise
from omninorm.monitor.history import NormFacts

EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
GAIN_NAMES = ("weight", "scale", "gamma", "gain", "g")


@dataclass
class Norm:
    """A norm: its facts, its module, whether it subtracts the mean, the offset of its stored gain, and the batch
    dimension of its input."""

    facts: NormFacts
    module: nn.Module
    centred: bool
    offset: float
    batch_dim: int = 0

    @property
    def gain(self) -> Tensor | None:
        """The gain as stored."""
        return find_gain(self.module)

    @property
    def dims(self) -> int:
        """The number of trailing dimensions that it normalizes over."""
        return len(getattr(self.module, "normalized_shape", (1,)))


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is LayerNorm, RMSNorm or a variant over the last dimension, of any library."""
    if isinstance(module, NORM_TYPES):
        return True
    if any(True for _ in module.children()) or "norm" not in type(module).__name__.lower():
        return False
    gain = find_gain(module)
    normalizes_batches = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm))
    return gain is not None and gain.ndim == 1 and not normalizes_batches


def find_gain(module: nn.Module) -> nn.Parameter | None:
    """Return a norm's gain, by its usual names."""
    found = (getattr(module, name, None) for name in GAIN_NAMES)
    return next((gain for gain in found if isinstance(gain, nn.Parameter) and not is_lazy(gain)), None)


def read_norm(name: str, module: nn.Module, block: int | None, batch_dim: int = 0) -> Norm:
    """Return the norm with its facts. Its forward may be called a few times, without hooks and gradients."""
    gains = list(module.parameters(recurse=False))
    ours = type(module).__module__.startswith("omninorm.")
    frozen = bool(gains) and not any(gain.requires_grad for gain in gains)
    facts = NormFacts(name, type(module).__name__, read_eps(module), block, frozen, ours)
    if isinstance(module, Pointwise):
        return Norm(facts, module, False, 0.0, batch_dim)
    return Norm(facts, module, *measure_norm(module), batch_dim)


def read_eps(module: nn.Module) -> float | None:
    """Return a norm's ε; None if it has none."""
    found = (getattr(module, name, None) for name in EPS_NAMES)
    eps = next(
        (float(value) for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)), None
    )
    if eps is None and hasattr(module, "eps") and isinstance(module, NORM_TYPES):  # the machine epsilon
        gain = find_gain(module)
        is_double = gain is not None and gain.dtype == torch.float64
        return torch.finfo(torch.float64 if is_double else torch.float32).eps
    return eps


@torch.no_grad()
def measure_norm(module: nn.Module) -> tuple[bool, float]:
    """Return whether the norm is invariant to a constant added to its input, and the offset of its gain (0; Gemma: 1).

    For x = ±1 alternating, N(x) − N(−x) = 2 γ x up to ε, because x has mean 0 and standard deviation 1.
    """
    by_kind, by_name = isinstance(module, nn.LayerNorm), float(getattr(module, "gain_offset", 0.0))
    gain = find_gain(module)
    known = isinstance(module, NORM_TYPES)
    # A module with buffers may count calls or average its inputs.
    if known or gain is None or gain.ndim != 1 or gain.numel() < 2 or any(True for _ in module.buffers()):
        return by_kind, by_name
    width = gain.numel() - gain.numel() % 2
    x = torch.ones_like(gain)
    x[1:width:2] = -1
    if width < gain.numel():
        x[-1] = 0
    try:
        plus, minus, shifted = (module.forward(row).float() for row in (64 * x, -64 * x, 64 * x + 64))
        effective = (plus - minus)[:width] / (2 * x[:width].float())
        offset = (effective - gain[:width].float()).median()
    except Exception:  # a norm that needs another shape: nothing is known about it
        return by_kind, by_name
    centred = torch.allclose(shifted, plus, rtol=1e-2, atol=1e-2 * float(plus.abs().max()) + 1e-6)
    centred = centred and bool((plus - minus).abs().max() > 0)
    return bool(centred), 1.0 if abs(float(offset) - 1.0) < 0.1 else 0.0
