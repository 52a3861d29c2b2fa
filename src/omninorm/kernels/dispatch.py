"""Which back end computes a norm, and what can run here.

A back end is a module of this folder with the four norms' autograd functions. This version has one, the
reference; the choice is made here so that callers never name a back end.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from omninorm.kernels import reference


class Backend(NamedTuple):
    """A way to compute the norms: its name, whether it runs here, and if not, why."""

    name: str
    available: bool
    reason: str


def backends() -> list[Backend]:
    """What can compute the norms on this machine, best first, and why the rest cannot.

    Example:
        >>> [backend.name for backend in backends() if backend.available]
        ['reference']
    """
    return [Backend("reference", True, "plain PyTorch, on every device")]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str) -> Tensor:
    y: Tensor = reference.RMSNormFunction.apply(x, weight, eps, gain_offset, cast)  # type: ignore[no-untyped-call]
    return y


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Tensor:
    y: Tensor = reference.LayerNormFunction.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y
