"""Checksums of tensors on their device: equal for equal bits, whatever the order of the summation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omninorm.monitor.probes.elements import some
from omninorm.monitor.tensors import stack

BITS = 40  # a few thousand of these sums still add up exactly in float64
MOST = 4096
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2⁶⁴ divided by the golden ratio, as a signed number


def checksum(tensors: Sequence[Tensor], most: int = MOST) -> Tensor:
    """Return a checksum of up to about `most` elements of each tensor, and of their order: an integer as float64."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    sums = [_of_device(group, most) for group in by_device.values()]
    return sums[0] if len(sums) == 1 else stack(sums, sums[0].device).sum()


def _of_device(tensors: Sequence[Tensor], most: int) -> Tensor:
    """Return the checksum of tensors on one device."""
    parts = [bits(some(tensor, most)) for tensor in tensors]
    words = torch.cat(parts) if len(parts) > 1 else parts[0]
    # Integer arithmetic wraps around, so unlike a sum of floating-point numbers it is associative.
    places = torch.arange(1, words.numel() + 1, device=words.device, dtype=torch.int64)
    mixed = (words + places) * (places * _ODD | 1)
    mixed = (mixed ^ (mixed >> 29)) * _ODD
    return ((mixed.sum() >> 8) & ((1 << BITS) - 1)).to(torch.float64)


def bits(x: Tensor) -> Tensor:
    """Return the bits of each element as an integer."""
    x = torch.view_as_real(x).flatten() if x.is_complex() else x
    return x.contiguous().view(_INTEGERS[x.element_size()]).to(torch.int64)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the dense tensors in a module's arguments: in lists, tuples and mappings as well."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided and value.numel() > 0 and not value.is_nested and not value.is_meta:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
