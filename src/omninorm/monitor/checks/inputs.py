"""Measures the size of the model's floating-point inputs, such as images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omninorm.monitor.checks.checksum import tensors_in
from omninorm.monitor.probes.elements import some
from omninorm.monitor.probes.gradients import norms_of
from omninorm.monitor.tensors import stack


def sizes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return some elements of each floating-point tensor in a model's arguments, without masks and labels."""
    named = [value for name, value in kwargs.items() if "mask" not in name and "label" not in name]
    tensors = [tensor for tensor in tensors_in([list(args), named]) if tensor.is_floating_point() and tensor.ndim > 1]
    return [some(tensor) for tensor in tensors]


def rms_of(parts: Sequence[Tensor]) -> Tensor:
    """Return the RMS of all elements."""
    norms = stack(norms_of(parts), parts[0].device)
    total: Tensor = torch.linalg.vector_norm(norms)
    return total / math.sqrt(max(1, sum(part.numel() for part in parts)))
