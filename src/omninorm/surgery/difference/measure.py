"""The relative difference of two activations, without padding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omninorm.surgery.difference.calls import main_of


@dataclass(frozen=True)
class Rows:
    """The rows of an activation that are compared.

    Args:
        real: (batch, sequence), False where a position is padding; None if there is none.
        most: at most so many rows, evenly spaced; None for all.
    """

    real: Tensor | None = None
    most: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = self._without_padding(x)
        if self.most is None or x.ndim < 2:
            return x
        rows = x.flatten(0, -2)
        return rows[:: max(1, math.ceil(len(rows) / self.most))]

    def _without_padding(self, x: Tensor) -> Tensor:
        if self.real is None:
            return x
        real, (batch, length) = self.real.to(x.device), self.real.shape
        if x.shape[:2] == (batch, length):
            return x[real]
        if x.ndim > 3 and (x.shape[0], x.shape[2]) == (batch, length):  # (batch, heads, sequence, …)
            return x.transpose(1, 2)[real]
        return x[real.flatten()] if x.ndim > 1 and len(x) == real.numel() else x


def padding_of(probe: Any) -> Tensor | None:
    """Return which positions of an input are real by its attention_mask (batch, sequence), or None if all are."""
    mask = probe.get("attention_mask") if isinstance(probe, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return None
    real = mask.bool().cpu()
    return None if bool(real.all()) else real


def relative(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖a‖, or ‖b‖ in place of ‖a‖ if that is 0.

    It is infinite if the shapes differ, if either holds NaN, or where only one of them is infinite.
    """
    if a.shape != b.shape:
        return math.inf
    a, b = a.detach().cpu(), b.detach().cpu()
    equal = a == b
    if bool(equal.all()):
        return 0.0
    a, b = (each.double().masked_fill(equal & ~each.double().isfinite(), 0.0) for each in (a, b))
    if not (is_finite(a) and is_finite(b)):
        return math.inf
    scale = max(float(a.abs().max()), float(b.abs().max()))
    a, b = a / scale, b / scale  # squares of masks, which may hold the largest numbers of a dtype, would overflow
    return float((a - b).norm() / (a.norm() or b.norm()))


def between(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference of outputs with the same names, or else of the main ones."""
    if a.keys() == b.keys():
        return max((relative(a[name], b[name]) for name in a), default=0.0)
    ours, theirs = main_of(a), main_of(b)
    return math.inf if ours is None or theirs is None else relative(ours, theirs)


def is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def percent(value: float) -> str:
    """Return a relative difference for a sentence: "2.1 %", "3e-09", or that it is not finite."""
    if not math.isfinite(value):
        return "NaN or infinite values"
    return f"{float(f'{100 * value:.2g}'):g} %" if value >= 1e-3 else f"{value:.0e}" if value else "0"
