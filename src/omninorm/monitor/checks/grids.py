"""Measures the gradients of a few matrices at the optimizer's step: elements that are 0, and whether they look random.

The gradient of a linear layer is a sum of outer products over tokens. So an element is 0 only if its whole row or
column is, unless it underflows; and rows and columns differ in size, unless the elements are independent noise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omninorm.monitor.stats_buffer import UNSEEN
from omninorm.monitor.tensors import here

MOST_MATRICES, SIDE = 8, 32


@dataclass(frozen=True)
class Grid:
    """What some elements of a matrix's gradient look like.

    Args:
        name: the parameter.
        zeros: the share of the elements that are 0 although neither their row nor their column is; 1 if all are 0.
        unevenness: the relative variance of the rows' mean squares or that of the columns, whichever is larger, divided
            by the value for independent normal elements.
    """

    name: str
    zeros: float
    unevenness: float


class Grids:
    """Measures 32 × 32 elements of the gradients of up to 8 matrices, evenly spaced over the blocks.

    Args:
        inside: the indices of the parameters inside blocks, which are preferred.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[nn.Parameter], inside: Collection[int]) -> None:
        self._names, self._parameters = names, parameters
        fitting = [
            at
            for at, p in enumerate(parameters)
            if p.requires_grad and p.ndim == 2 and min(p.shape) >= SIDE and (at in inside or not inside)
        ]
        step = -(-len(fitting) // MOST_MATRICES) or 1
        self._places = fitting[::step]
        self._found: tuple[list[int], Tensor] | None = None
        self._taken: list[int] = []

    def before_step(self, held: Collection[int]) -> None:
        """Measure the gradients of the parameters with these ids."""
        places = [at for at in self._places if id(self._parameters[at]) in held and self._is_large(at)]
        if places and self._found is None:
            first = here(self._parameters[places[0]].grad).device  # a model may be split over devices
            grids = [grid_of(here(self._parameters[at].grad)) for at in places]
            kinds = {(grid.device, grid.dtype) for grid in grids}
            if len(kinds) > 1:
                grids = [grid.float().to(first, non_blocking=True) for grid in grids]
            self._found = places, measure(torch.stack(grids).float())

    def _is_large(self, at: int) -> bool:
        gradient = self._parameters[at].grad
        return gradient is not None and not gradient.is_sparse and min(here(gradient).shape) >= SIDE

    def take(self) -> dict[str, Tensor]:
        """Return the measurements of a sampled step, flat."""
        if self._found is None:
            return {}
        (self._taken, values), self._found = self._found, None
        return {"grids": values.flatten()}

    def result(self, numbers: Mapping[str, list[float]]) -> tuple[Grid, ...]:
        """Return what was measured, from the numbers of `take` on the host."""
        found = numbers.get("grids", [])
        pairs = zip(self._taken, zip(found[::2], found[1::2], strict=True), strict=False)
        return tuple(Grid(self._names[at], *pair) for at, pair in pairs if UNSEEN not in pair)


def grid_of(x: Tensor, side: int = SIDE) -> Tensor:
    """Return a view of side × side evenly spaced elements of a matrix."""
    rows, columns = (max(1, size // side) for size in x.shape)
    down, across = x.stride()
    sizes = [min(side, -(-size // step)) for size, step in zip(x.shape, (rows, columns), strict=True)]
    return x.detach().as_strided(sizes, (down * rows, across * columns))


def measure(grids: Tensor) -> Tensor:
    """Return zeros and unevenness of each grid (count, side, side): (count, 2); UNSEEN if it is not finite."""
    present = grids != 0
    live = present.any(1, keepdim=True) & present.any(2, keepdim=True)
    zeros = 1 - present.sum((1, 2)) / live.sum((1, 2)).clamp_min(1)
    scaled = grids / grids.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(grids.dtype).tiny)
    squares = scaled.square()
    uneven = torch.maximum(_unevenness(squares.mean(1)), _unevenness(squares.mean(2)))
    found = torch.stack([zeros, uneven], dim=1)
    return torch.where(found.isfinite().all(1, keepdim=True), found, UNSEEN)


def _unevenness(means: Tensor) -> Tensor:
    """Return the relative variance of mean squares (count, side), divided by 2/side, that of normal elements."""
    return means.var(1) / means.mean(1).square().clamp_min(1e-30) / (2 / means.shape[1])
