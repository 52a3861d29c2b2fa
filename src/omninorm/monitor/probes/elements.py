"""Some elements of many tensors, which are measured together."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from omninorm.kernels.distributed import is_distributed
from omninorm.monitor.probes.block import stride
from omninorm.monitor.tensors import constant, here, holds_numbers

# Elements per tensor: in sampled steps, and in every step to detect NaNs.
SAMPLED, EVERY_STEP = 1024, 64
# Elements that are next to each other in memory: reading them costs about as much as reading one.
RUN = 8
_PLAIN = (nn.Parameter, Tensor)
_USUAL = frozenset([torch.float32, torch.bfloat16, torch.float16, torch.float64])
_NOWHERE: tuple[int, int, tuple[int], tuple[int]] = (-1, 0, (0,), (1,))


def some(x: Tensor, most: int = SAMPLED) -> Tensor:
    """Return at most about `most` evenly spaced elements of x, 1-D; a view if x is contiguous. Of a DTensor, read the
    local shard: each process monitors its own part."""
    flat = here(x.detach()).reshape(-1)
    return flat[:: stride(flat.numel(), most)]


def any_some(x: Tensor, most: int = EVERY_STEP) -> Tensor:
    """Return a view of at most about `most` elements of x, evenly spaced in memory; of a DTensor, the local shard."""
    x = here(x.detach())
    step = memory_stride(tuple(x.shape), x.stride(), most)
    return some(x, most) if step is None else x.as_strided((-(-x.numel() // step),), (step,))


@lru_cache(maxsize=4096)
def memory_stride(shape: tuple[int, ...], strides: tuple[int, ...], most: int) -> int | None:
    """Return the stride that selects about `most` elements in memory; None if they are not next to each other."""
    count = 1
    for size, distance in sorted(zip(shape, strides, strict=True), key=lambda each: each[1]):
        if size != 1 and distance != count:
            return None
        count *= size
    return stride(count, most)


def runs(x: Tensor) -> Tensor:
    """Return a view of 1,024 elements of x in runs of 8: (128, 8); of a smaller tensor all elements, 1-D.

    Of a DTensor, read the local shard. Call it without a graph.
    """
    if type(x) not in _PLAIN or not x.is_contiguous() or x.dtype not in _USUAL:
        x = here(x.detach())
        x = (x.float() if x.element_size() == 1 else x).reshape(-1)
    count = x.numel()
    if count <= SAMPLED:
        return x if x.ndim == 1 else x.view(-1)
    return x.as_strided((SAMPLED // RUN, RUN), (_fitting_stride(count, SAMPLED // RUN, RUN), 1))


@lru_cache(maxsize=4096)
def _fitting_stride(count: int, runs: int, length: int) -> int:
    """Return the distance between that many runs in `count` elements. It is coprime to `count`: see `stride`."""
    step = max(1, (count - length) // (runs - 1))
    while math.gcd(step, count) > 1:
        step -= 1
    return step


class Together(NamedTuple):
    """The elements that `runs` chooses of several tensors: (tensors, elements), and the places of the tensors."""

    places: list[int]
    values: Tensor

    def of(self, chosen: Container[int]) -> Tensor:
        """Return the values of the tensors at the chosen places."""
        kept = tuple(at for at, place in enumerate(self.places) if place in chosen)
        return self.values if len(kept) == len(self.places) else self.values[constant(kept, self.values.device)]


def together(tensors: Mapping[int, Tensor]) -> list[Together]:
    """Copy some elements of each tensor, with one operator for those of equal number, device and dtype."""
    groups: dict[tuple[int, int, torch.dtype, torch.device], tuple[list[int], list[Tensor]]] = {}
    for place, tensor in tensors.items():
        part = runs(tensor)
        count = part.numel()
        if count > 0:
            places, parts = groups.setdefault((count, part.ndim, part.dtype, part.device), ([], []))
            places.append(place)
            parts.append(part)
    return [Together(places, _rows(parts)) for places, parts in groups.values()]


def _rows(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).flatten(1) if parts[0].ndim > 1 else torch.stack(parts)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements that `runs` chooses of tensors of which it chooses equally many: (tensors, elements)."""
    return _rows([runs(tensor) for tensor in tensors])


def row_norms(rows: Tensor) -> Tensor:
    """Return ‖·‖₂ of each row: on a CPU in float64, which does not overflow, and otherwise in float32 or wider."""
    wide = torch.float64 if rows.is_cpu else torch.promote_types(rows.dtype, torch.float32)
    found: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=wide)
    return found


class Views:
    """Makes views of some elements of each tensor.

    They are made in each step, because they would keep the memory of a model that is moved. Only where to look is kept.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._known = [(tensor, *_NOWHERE) for tensor in tensors]

    def take(self) -> list[Tensor]:
        """Return the views: 1-D. Call it without a graph."""
        return [
            tensor.as_strided(sizes, steps)
            if tensor.data_ptr() == address and tensor.numel() == count
            else self._look(at, tensor)
            for at, (tensor, address, count, sizes, steps) in enumerate(self._known)
        ]

    def _look(self, at: int, tensor: Tensor) -> Tensor:
        """Return the view of a tensor whose memory is new, or not known."""
        if is_distributed(tensor) or memory_stride(tuple(tensor.shape), tensor.stride(), EVERY_STEP) is None:
            self._known[at] = (tensor, *_NOWHERE)
            return any_some(tensor)
        size, count, step = tensor.numel(), tensor.numel(), 1
        if size >= 2 * EVERY_STEP:  # equally many of most tensors, so that they can be measured together
            count = EVERY_STEP
            step = (size - 1) // (count - 1) if tensor.ndim == 1 else _fitting_stride(size, count, 1)
        self._known[at] = (tensor, tensor.data_ptr(), size, (count,), (step,))
        return tensor.as_strided((count,), (step,))


def packed(parts: Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    """Return copies of 1-D tensors next to each other in memory, if they are of one kind: (tensors, elements) if they
    are equally long. PyTorch measures those in one operator, and tensors with gaps with one operator each."""
    if len({(part.device, part.dtype) for part in parts}) != 1:
        return parts
    sizes, flat = [part.shape[0] for part in parts], torch.cat(list(parts))
    return flat.view(len(sizes), -1) if len(set(sizes)) == 1 else torch.split(flat, sizes)


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors in host memory are finite; False if they are elsewhere, where reading them would wait."""
    if any(not on_host or dtype.itemsize == 1 for on_host, dtype in {(x.is_cpu, x.dtype) for x in tensors}):
        return False
    total = torch.cat(list(tensors)).sum(dtype=torch.float64)
    return holds_numbers(total) and math.isfinite(total.item())
