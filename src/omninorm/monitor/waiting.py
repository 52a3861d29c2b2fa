"""Tensors that wait, within a step, to be measured together: one operator for many costs less than one for each.

Until then they take at most about 32 MB of an accelerator's memory each in `Peaks` and `Batches`, or one tensor more.
Measuring a batch takes a few times as much for a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omninorm.monitor.tensors import by_kind, here, holds_numbers, version_of

MOST_BYTES = 2**25
# On a CPU a call costs less, and a batch should fit into the cache.
MOST_BYTES_CPU = 2**20


class _Output(NamedTuple):
    """A module's output, the version that it had, and whether it has been measured already."""

    place: int
    y: Tensor
    version: int
    measured: bool


class Peaks:
    """The largest |x| of modules' outputs, by place.

    On an accelerator, outputs are kept until the forward pass ends or too many bytes wait. Those that are changed in
    place before that must be measured at once. So every output is, when its module runs for the first time, and later
    only if it had been changed by the end. If the changes begin later, one step's peak is that of the changed output.

    On a CPU, where an output is still in the cache, it is measured at once.
    """

    def __init__(self) -> None:
        self._extremes: list[tuple[int, Tensor, Tensor]] = []
        self._waiting: list[_Output] = []
        self._bytes = 0
        self._overwritten: dict[int, bool] = {}
        self._found: list[tuple[int, Tensor]] = []

    @property
    def count(self) -> int:
        """The number of results and outputs that wait."""
        return len(self._extremes) + len(self._waiting) + len(self._found)

    def add(self, place: int, y: Tensor) -> None:
        """Measure y now or later."""
        y = here(y).detach()
        if y.is_cpu or y.numel() == 0:
            self._extremes.append((place, *extremes(y)))
            return
        overwritten = self._overwritten.get(place)
        if overwritten is not False:
            self._measure([(place, y)])
        if overwritten is not True:
            self._waiting.append(_Output(place, y, version_of(y), overwritten is None))
            self._bytes += y.untyped_storage().nbytes()
            if self._bytes > MOST_BYTES:
                self.measure()

    def measure(self) -> None:
        """Measure the outputs that wait."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        left = []
        for place, y, version, measured in waiting:
            # FSDP frees the memory of gathered parameters, of which an output may be a view.
            freed = y.untyped_storage().nbytes() == 0
            if freed or version_of(y) != version:
                self._overwritten[place] = True
            elif measured:
                self._overwritten.setdefault(place, False)
            if not (measured or freed):
                left.append((place, y))
        self._measure(left)

    def _measure(self, outputs: Sequence[tuple[int, Tensor]]) -> None:
        for chosen in by_kind({at: y for at, (_, y) in enumerate(outputs)}).values():
            places = [outputs[at][0] for at in chosen]
            self._found += zip(places, torch._foreach_norm([outputs[at][1] for at in chosen], math.inf), strict=True)

    def take(self) -> list[tuple[int, Tensor]]:
        """Return the places and peaks since the last call."""
        self.measure()
        found, self._found = self._found, []
        extremes, self._extremes = self._extremes, []
        for places, least, most in _by_kind(extremes):
            values = torch.stack([*least, *most])
            found += zip(places, torch.maximum(values[len(least) :], -values[: len(least)]).unbind(), strict=True)
        return found


def _by_kind(extremes: Sequence[tuple[int, Tensor, Tensor]]) -> Iterator[tuple[Any, ...]]:
    """Yield places, minima and maxima of each device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor, Tensor]]] = {}
    for each in extremes:
        kinds.setdefault((each[1].device, each[1].dtype), []).append(each)
    for group in kinds.values():
        yield tuple(zip(*group, strict=True))


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return min x and max x; NaN if there is one, 0 for an empty tensor."""
    if x.numel() == 0:
        zero = x.new_zeros(())
        return zero, zero
    least, most = torch.aminmax(x)
    return least, most


Site = Any  # a probe
Kind = tuple[Callable[..., None], tuple[Any, ...], Hashable]  # a function, its arguments, and the tensors' shapes


class Batches:
    """Rows of a sampled step. Those of one kind, of equal shape and dtype, are stacked and measured together."""

    def __init__(self) -> None:
        self._groups: dict[Kind, list[tuple[Site, tuple[Tensor | None, ...]]]] = {}
        self._bytes = 0

    def add(
        self, measure: Callable[..., None], site: Site, *tensors: Tensor | None, arguments: tuple[Any, ...] = ()
    ) -> None:
        """Call `measure(sites, *stacked, *arguments)` later, with the tensors of several sites stacked.

        The tensors must be copies, or never be changed in place.
        """
        kinds, size, on_host = list[Any](), 0, True
        for x in tensors:
            if x is None:
                kinds.append(None)
                continue
            if not holds_numbers(x):
                return
            kinds.append((x.shape, x.dtype, x.device))
            size += x.nbytes
            on_host = x.is_cpu
        self._groups.setdefault((measure, arguments, tuple(kinds)), []).append((site, tensors))
        self._bytes += size
        if self._bytes > (MOST_BYTES_CPU if on_host else MOST_BYTES):
            self.measure()

    def measure(self) -> None:
        """Measure everything that waits. An error loses only its own kind; the first is raised at the end."""
        groups, self._groups, self._bytes = self._groups, {}, 0
        errors = []
        for (measure, arguments, _), members in groups.items():
            try:
                sites, columns = [site for site, _ in members], zip(*(tensors for _, tensors in members), strict=True)
                stacked = [None if column[0] is None else _stacked(column) for column in columns]
                members.clear()
                measure(sites, *stacked, *arguments)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def _stacked(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)
