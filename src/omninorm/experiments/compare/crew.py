"""Sharing of GPUs among the workers of a comparison."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from omninorm.device import free_memory
from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.plan import needed_bytes

# Bytes per worker for the driver's context with PyTorch's kernels, and the factor by which activations and temporary
# tensors make a step larger than the lower bound of `needed_bytes`.
_CONTEXT, _MARGIN = 2**30, 4
_VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def usual_workers(cores: int, devices: Sequence[torch.device], cells: Iterable[Cell]) -> int:
    """Return the default number of workers: one per core, but on GPUs no more than fit in their free memory."""
    if devices[0].type != "cuda":
        return cores if devices[0].type == "cpu" else 1
    needed = _CONTEXT + _MARGIN * max(map(needed_bytes, cells), default=0)
    return min(cores, sum(max(1, (free_memory(device) or 0) // needed) for device in devices))


def only_visible(device: torch.device) -> dict[str, str]:
    """Return the environment variable that hides all other GPUs from a process; none for other devices."""
    if device.type != "cuda":
        return {}
    variable = next((name for name in _VISIBLE if os.environ.get(name)), _VISIBLE[-1])
    visible = os.environ.get(variable, "")
    index = device.index or 0
    return {variable: visible.split(",")[index] if visible else str(index)}


def name_alone(device: torch.device) -> str:
    """Return the device's name in a process with these variables."""
    return "cuda:0" if device.type == "cuda" else str(device)
