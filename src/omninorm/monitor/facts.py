"""Facts about the model and its optimizers, found when a watch is opened."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from omninorm.monitor.checks.precision import expected_dtype
from omninorm.monitor.checks.weights import look_random, matrices_of
from omninorm.monitor.history import Facts
from omninorm.monitor.model_map.structure import Structure, matrix_names
from omninorm.monitor.probes.optimizer import adam_eps


def facts_of(
    structure: Structure,
    optimizers: Sequence[torch.optim.Optimizer],
    every: int,
    settings: Mapping[str, Any] | None = None,
) -> Facts:
    """Return what does not change during the run. `settings` is the run's config."""
    return Facts(
        model=type(structure.model).__name__,
        parameters=sum(parameter.numel() for parameter in structure.model.parameters()),
        blocks=tuple(block.name for block in structure.blocks),
        norms=tuple(norm.facts for norm in structure.norms),
        groups=tuple(structure.groups),
        attentions=tuple(block.attention for block in structure.blocks),
        feed_forwards=tuple(block.feed_forward for block in structure.blocks),
        routers=tuple(block.router[0] if block.router else None for block in structure.blocks),
        chains=tuple(tuple(chain) for chain in structure.chains),
        optimizer=type(optimizers[0]).__name__ if optimizers else None,
        adam_eps=adam_eps(optimizers),
        every=every,
        width=typical_width(structure),
        alike=alike(structure),
        fresh=look_random(matrices_of(structure)),
        precision=expected_dtype(settings or {}),
    )


def alike(structure: Structure) -> tuple[int, ...]:
    """Return a number for each block, equal for blocks of the same class whose matrices have the same names."""
    kinds: dict[object, int] = {}
    found = []
    for block in structure.blocks:
        found.append(kinds.setdefault((type(block.module), matrix_names(block.module)), len(kinds)))
    return tuple(found)


def typical_width(structure: Structure) -> float | None:
    """Return the median of the smaller sides of the matrices in the blocks, or of all matrices without blocks."""
    blocks = {block.name for block in structure.blocks}
    groups = [tensors for name, tensors in structure.groups.items() if name in blocks or not blocks]
    matrices = [tensor for tensors in groups for _, tensor in tensors if tensor.ndim >= 2 and tensor.numel() > 0]
    sides = [min(tensor.shape[0], tensor.numel() // tensor.shape[0]) for tensor in matrices]
    return float(statistics.median_low(sides)) if sides else None
