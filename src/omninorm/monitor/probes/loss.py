"""Probe of the loss: whether cross entropy receives probabilities instead of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omninorm.monitor.probes.block import stride
from omninorm.monitor.stats_buffer import StatsBuffer

MOST_ROWS = 64
TOLERANCE = 1e-3  # of a row's sum in float32; bfloat16 rounds each probability


def see_loss(buffer: StatsBuffer, logits: Any) -> None:
    """Measure the input of cross entropy, (classes), (batch, classes) or (batch, classes, …)."""
    # Subclasses, such as sharded logits, may communicate, and tensors inside torch.func have no values of their own.
    if type(logits) is not Tensor or not logits.requires_grad or logits.ndim == 0 or logits.numel() == 0:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(logits):
        return
    rows = some_predictions(logits.detach())
    if rows.shape[-1] > 1:
        buffer.peak("probabilities", 0, are_probabilities(rows))


def some_predictions(x: Tensor) -> Tensor:
    """Return at most 64 rows over the classes: (rows, classes). Only these are copied."""
    classes = min(1, x.ndim - 1)
    left = MOST_ROWS
    for dim in range(x.ndim):
        if dim != classes:
            count = x.shape[dim]
            x = x[(slice(None),) * dim + (slice(None, None, stride(count, left)),)]
            left = max(1, left // x.shape[dim])
    return x.movedim(classes, -1).reshape(-1, x.shape[classes])[:MOST_ROWS]


def are_probabilities(rows: Tensor) -> Tensor:
    """Return 1 if every row is a probability distribution, otherwise 0, without synchronizing."""
    tolerance = max(TOLERANCE, 2 * torch.finfo(rows.dtype).eps)
    values = rows if rows.dtype == torch.float64 else rows.float()
    sums_to_one = ((values.sum(-1) - 1).abs() <= tolerance).all()
    return ((values.amin() >= 0) & sums_to_one).to(torch.float32)
