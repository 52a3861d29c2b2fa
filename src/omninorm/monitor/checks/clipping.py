"""Compares the gradient at the optimizer's step with the gradient after the backward pass."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from omninorm.monitor.probes.gradients import spread, stacked_norms
from omninorm.monitor.stats_buffer import UNSEEN
from omninorm.monitor.tensors import constant, here, norms_of_whole


class Clipping:
    """Measures ‖gradient‖ of the parameters before the optimizers' steps of a sampled step."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._parameters, self._device = parameters, device
        self._found: Tensor | None = None

    def before_step(self, held: Collection[int]) -> None:
        """Measure the gradients of the parameters with these ids."""
        places = [at for at, p in enumerate(self._parameters) if id(p) in held and _is_dense(p)]
        if not places:
            return
        gradients = [self._parameters[at].grad for at in places]
        norms = norms_of_whole(stacked_norms([here(g) for g in gradients], self._device), gradients)
        found = norms
        if len(places) < len(self._parameters):
            found = spread(norms, constant(tuple(places), self._device), len(self._parameters))
        self._found = found if self._found is None else torch.where(self._found == UNSEEN, found, self._found)

    def take(self) -> Tensor | None:
        found, self._found = self._found, None
        return found


def _is_dense(parameter: Tensor) -> bool:
    return parameter.grad is not None and not parameter.grad.is_sparse


def totals(before: Sequence[float], after: Sequence[float] | None) -> tuple[float, float] | None:
    """Return the norms of the gradient before and after clipping, over the parameters that were measured twice."""
    if after is None:
        return None
    pairs = [pair for pair in zip(before, after, strict=True) if UNSEEN not in pair]
    if not pairs:
        return None
    return math.hypot(*(one for one, _ in pairs)), math.hypot(*(other for _, other in pairs))
