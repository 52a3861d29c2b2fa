"""What a norm is, whoever wrote it, and what it does.

A norm is a leaf with a gain for each feature. Does it centre, is its gain stored as γ − 1? That is measured on small
vectors, where its class does not tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from omninorm.layers import NORM_TYPES
from omninorm.layers.pointwise import Pointwise
from omninorm.watch.history import NormFacts

EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
GAIN_NAMES = ("weight", "scale", "gamma", "gain", "g")


@dataclass
class Norm:
    """A norm: its facts, module, whether it subtracts the mean, what must be added to its stored gain, and along which
    dimension of its input the examples are counted."""

    facts: NormFacts
    module: nn.Module
    centred: bool
    offset: float
    batch_dim: int = 0

    @property
    def gain(self) -> Tensor | None:
        """γ as it is stored."""
        return find_gain(self.module)

    @property
    def dims(self) -> int:
        """Over how many trailing dimensions it normalizes."""
        return len(getattr(self.module, "normalized_shape", (1,)))


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and their relatives over the last dimension, whoever wrote them."""
    if isinstance(module, NORM_TYPES):
        return True
    if any(True for _ in module.children()) or "norm" not in type(module).__name__.lower():
        return False
    gain = find_gain(module)
    normalizes_batches = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm))
    return gain is not None and gain.ndim == 1 and not normalizes_batches


def find_gain(module: nn.Module) -> nn.Parameter | None:
    """A norm's γ, by the names that are in use."""
    found = (getattr(module, name, None) for name in GAIN_NAMES)
    return next((gain for gain in found if isinstance(gain, nn.Parameter) and not is_lazy(gain)), None)


def read_norm(name: str, module: nn.Module, block: int | None, batch_dim: int = 0) -> Norm:
    """The norm's facts. Its forward is called some times, without hooks and without gradients."""
    gains = list(module.parameters(recurse=False))
    ours = type(module).__module__.startswith("omninorm.")
    frozen = bool(gains) and not any(gain.requires_grad for gain in gains)
    facts = NormFacts(name, type(module).__name__, read_eps(module), block, frozen, ours)
    if isinstance(module, Pointwise):
        return Norm(facts, module, False, 0.0, batch_dim)
    return Norm(facts, module, *measure_norm(module), batch_dim)


def read_eps(module: nn.Module) -> float | None:
    """A norm's ε; None where it has none."""
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
    """Whether the norm ignores a constant added to its input, and what it adds to its stored gain (0, or Gemma's 1).

    For x = ±1 by turns, N(x) − N(−x) = 2 γ x but for ε, because mean and deviation of x are 0 and 1.
    """
    by_kind, by_name = isinstance(module, nn.LayerNorm), float(getattr(module, "gain_offset", 0.0))
    gain = find_gain(module)
    known = isinstance(module, NORM_TYPES)
    # A module with buffers may count or average what it sees.
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
    except Exception:  # a norm that wants another shape: nothing is known of it
        return by_kind, by_name
    centred = torch.allclose(shifted, plus, rtol=1e-2, atol=1e-2 * float(plus.abs().max()) + 1e-6)
    centred = centred and bool((plus - minus).abs().max() > 0)
    return bool(centred), 1.0 if abs(float(offset) - 1.0) < 0.1 else 0.0
