"""Preallocated device buffers that accumulate a step's statistics and are copied to the host in one transfer.

There are two kinds. *Cells* hold the statistics of a sampled step: sums, whose terms the host counts, or peaks. The
*ring buffer* has a row for each step since the last sample: the peak |x| of each sentinel (a module whose output is
checked in every step), the loss, and for each parameter the norms of its gradient and of some of its weights. A NaN or
an infinity in a row shows the step and the place where it appeared, without synchronizing in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from omninorm.monitor.tensors import by_kind, constant, holds_numbers, stack, widest
from omninorm.monitor.waiting import Batches, Peaks

FACTS = ("kept", "batch", "input")
"""Numbers that only some steps have: see `omninorm.monitor.checks.facts.StepChecks`."""
UNSEEN = -1.0  # in the ring buffer: measured values are ≥ 0 or not finite
Waiting = TypeVar("Waiting")
Placed = tuple[tuple[int, ...], Tensor]  # places, and a value for each
# Values that may wait before they are written, for loops that never end a step.
MOST_WAITING = 16384


class StatsBuffer:
    """Cells by signal and index, and the ring buffer.

    Args:
        device: the device of the model.
        cells: the number of cells of each raw signal.
        sentinels: the number of modules that are checked in every step.
        parameters: the number of parameters.
        rows: steps between samples.
        scaler: a torch.amp.GradScaler, if one scales the loss.
    """

    def __init__(
        self,
        device: torch.device,
        cells: dict[str, int],
        sentinels: int,
        parameters: int,
        rows: int,
        scaler: Any = None,
    ) -> None:
        self._scaler = scaler
        self.device = device
        self.sizes = cells
        starts, total = {}, 0
        for key, count in cells.items():
            starts[key] = total
            total += count
        self._starts = starts
        # Squares of exploding activations need the range of float64.
        dtype = widest(device)
        self._values = torch.zeros(total, device=device, dtype=dtype)
        self._counts = [0] * total
        self._sentinels, self._parameters = sentinels, parameters
        self.rows = rows
        self._ring = torch.full((rows, sentinels + 1 + len(FACTS) + 2 * parameters), UNSEEN, device=device, dtype=dtype)
        self._views: dict[int, tuple[Tensor, ...]] = {}  # of the rows
        self._losses: list[bool] = []
        # Values that wait to be written together, by place: one operator for all of them costs less than one for each.
        self._terms: list[Placed] = []
        self._peaks: list[Placed] = []
        self._outputs: list[tuple[int, Tensor]] = []
        self._peaks_of_outputs, self._batches = Peaks(), Batches()
        self.streams: dict[int, int] = {}  # the block of each sentinel whose peak is also that of the residual stream
        self.batch = self._batches.add
        self.sampling = False
        self.order: dict[int, int] = {}  # sentinels, numbered in the order in which they first ran
        self.row = 0
        self._begin_row()

    def _begin_row(self) -> None:
        if self.row not in self._views:
            sizes = [self._sentinels, 1, len(FACTS), self._parameters, self._parameters]
            self._views[self.row] = torch.split(self._ring[self.row], sizes)
        self._row_sentinels, self._row_loss, facts, self._row_gradients, self._row_weights = self._views[self.row]
        self._row_facts = facts
        self._written: set[str] = set()

    # Writing, on the device -----------------------------------------------------------------------------------------

    def add(self, key: str, index: int | Sequence[int], value: Tensor) -> None:
        """Add a term of a mean, or one for each of several indices."""
        for placed in self._placed(key, index, value):
            self._terms.append(placed)
            for place in placed[0]:
                self._counts[place] += 1
        if len(self._terms) > MOST_WAITING:
            self._write_cells()

    def peak(self, key: str, index: int | Sequence[int], value: Tensor) -> None:
        """Update a maximum of values ≥ 0, or one for each of several indices."""
        for placed in self._placed(key, index, value):
            self._peaks.append(placed)
            for place in placed[0]:
                self._counts[place] = 1
        if len(self._peaks) > MOST_WAITING:
            self._write_cells()

    def _placed(self, key: str, index: int | Sequence[int], value: Tensor) -> list[Placed]:
        """Return the values, 1-D, with their places."""
        if not holds_numbers(value):
            return []
        start = self._starts[key]
        places = (start + index,) if isinstance(index, int) else tuple(start + at for at in index)
        return [(places, value.reshape(len(places)))]

    def add_gradient(self, key: str, index: int | Sequence[int], square: Tensor) -> None:
        """Add terms of means of squared gradients, after removing the factor of a GradScaler."""
        scale = self.scale
        self.add(key, index, square if scale is None else square / scale.to(square).square())

    @property
    def scale(self) -> Tensor | None:
        """The factor of the GradScaler, if there is one."""
        scale = getattr(self._scaler, "_scale", None)
        return scale if isinstance(scale, Tensor) else None

    def sentinel(self, index: int, y: Tensor) -> None:
        """Record the largest |y| of a module's output in this step."""
        if not holds_numbers(y):
            return
        if index not in self.order:
            self.order[index] = len(self.order)
        self._peaks_of_outputs.add(index, y)
        if self._peaks_of_outputs.count > MOST_WAITING:  # in loops that never end a forward pass or a step
            self.measure_peaks()

    def measure_peaks(self) -> None:
        """Measure the outputs that wait, before they are overwritten."""
        found = self._peaks_of_outputs.take()
        for sentinel, value in found if self.sampling else ():
            if sentinel in self.streams:
                self.peak("stream_max", self.streams[sentinel], value)
        self._outputs += found
        if len(self._outputs) > MOST_WAITING:
            self._write_sentinels()

    def measure(self) -> None:
        """Measure what waits: at the end of a forward or backward pass, and before a row ends."""
        with torch._C.DisableTorchFunction():
            try:
                self.measure_peaks()
            finally:
                self._batches.measure()

    def _write_sentinels(self) -> None:
        """Update the row's peaks |x|.

        All sentinels are written, with UNSEEN for those that have not run: a list of those that have, which may differ
        in every step, would have to be copied to the device.
        """
        for outputs in in_rounds(self._outputs, lambda output: output[:1]):
            values = dict(outputs)
            for (device, dtype), places in by_kind(values).items():
                neutral = fill(UNSEEN, device, dtype)
                found = stack([values[at] if at in places else neutral for at in range(self._sentinels)], self.device)
                torch.maximum(self._row_sentinels, found, out=self._row_sentinels)

    def _write_cells(self) -> None:
        """Combine the values that wait with those at their places."""
        if self._terms:
            index, values = joined(self._terms, self.device)
            self._terms.clear()
            self._values.index_put_((index,), values, accumulate=True)
        for peaks in in_rounds(self._peaks, lambda placed: placed[0]):
            index, values = joined(peaks, self.device)
            self._values[index] = torch.maximum(self._values[index], values)

    def set_gradients(self, norms: Tensor) -> None:
        """Record ‖gradient‖ of every parameter; UNSEEN where there is none."""
        self._row_gradients.copy_(norms, non_blocking=True)

    def set_weights(self, norms: Tensor) -> None:
        """Record the norm of some weights of every parameter, after the step."""
        self._row_weights.copy_(norms, non_blocking=True)

    def add_fact(self, name: str, value: Tensor) -> None:
        """Add to one of the FACTS of this step."""
        cell = self._row_facts[FACTS.index(name)]
        value = value.detach().to(cell.dtype)
        cell.copy_(value + cell if name in self._written else value, non_blocking=True)
        self._written.add(name)

    def has_fact(self, name: str) -> bool:
        """Return whether one of the FACTS of this step has been added."""
        return name in self._written

    def end_row(self, loss: Tensor | None) -> None:
        """End the row of this step. It ends in any case: rows without a step would shift all later steps."""
        given = False
        try:
            if loss is not None and holds_numbers(loss):
                self._row_loss.copy_(loss.detach().to(self._row_loss.dtype).mean().reshape(1), non_blocking=True)
                given = True
            self._write_sentinels()
        finally:
            self._outputs.clear()
            self._losses.append(given)
            self.row += 1
            if self.row < self.rows:
                self._begin_row()

    @property
    def full(self) -> bool:
        return self.row >= self.rows

    # Reading, on the host -------------------------------------------------------------------------------------------

    def take(
        self, extra: Sequence[Tensor] = (), sampled: bool = True
    ) -> tuple[dict[str, list[float | None]], list[Row], list[list[float]]]:
        """Copy everything to the host in one transfer and clear the buffers. A row that has not ended is kept.

        Args:
            extra: further 1-D tensors to copy in the same transfer.
            sampled: whether a sampled step has ended; otherwise the cells are kept as well.

        Returns:
            The cells' means and peaks by signal (None where nothing was measured), the rows, and `extra` as lists.
        """
        try:
            return self._read(extra)
        finally:
            self._clear(sampled)

    def _read(self, extra: Sequence[Tensor]) -> tuple[dict[str, list[float | None]], list[Row], list[list[float]]]:
        self._write_cells()
        parts = [self._values, self._ring[: self.row].flatten(), *(part.to(self._values) for part in extra)]
        numbers = iter_split(torch.cat(parts).tolist(), [part.numel() for part in parts])
        values, ring, *rest = numbers
        cells: dict[str, list[float | None]] = {}
        for key, start in self._starts.items():
            places = range(start, start + self.sizes[key])
            cells[key] = [values[at] / self._counts[at] if self._counts[at] else None for at in places]
        if self._scaler is not None:  # scaled gradients may overflow although the gradients are finite
            found = cells.get("stream_grad_ms", [])
            cells["stream_grad_ms"] = [None if v is None or not math.isfinite(v) else v for v in found]
        width = self._ring.shape[1]
        rows = [
            Row(ring[at * width : (at + 1) * width], self._sentinels, self._parameters, given)
            for at, given in enumerate(self._losses)
        ]
        return cells, rows, rest

    def _clear(self, sampled: bool) -> None:
        current = None if self.full else self._ring[self.row].clone()
        written = set() if self.full else self._written
        self._ring.fill_(UNSEEN)
        if current is not None:
            self._ring[0] = current
        if sampled:
            self._values.zero_()
            self._counts = [0] * len(self._counts)
        self._losses = []
        self.row = 0
        self._begin_row()
        self._written = written


class Row:
    """The row of one step in the ring buffer, on the host."""

    def __init__(self, numbers: list[float], sentinels: int, parameters: int, loss_given: bool) -> None:
        sizes = [sentinels, 1, len(FACTS), parameters, parameters]
        self.sentinels, loss, facts, self.gradients, self.weights = iter_split(numbers, sizes)
        self.loss = loss[0] if loss_given else None
        self.facts = {name: None if value == UNSEEN else value for name, value in zip(FACTS, facts, strict=True)}


def iter_split(numbers: list[float], sizes: Sequence[int]) -> list[list[float]]:
    """Split a list into pieces of these sizes."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(numbers[start : start + size])
        start += size
    return pieces


def in_rounds(waiting: list[Waiting], places_of: Callable[[Waiting], Iterable[int]]) -> list[list[Waiting]]:
    """Empty the list; return its items in rounds, in each of which no place is repeated."""
    rounds: list[list[Waiting]] = []
    seen: dict[int, int] = {}
    for item in waiting:
        places = tuple(places_of(item))
        at = max(seen.get(place, 0) for place in places)
        seen.update(dict.fromkeys(places, at + 1))
        if at == len(rounds):
            rounds.append([])
        rounds[at].append(item)
    waiting.clear()
    return rounds


def joined(waiting: Sequence[Placed], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return all places and all values, in float64 where the device supports it."""
    kinds: dict[tuple[torch.dtype, torch.device], tuple[list[int], list[Tensor]]] = {}
    for places, values in waiting:
        all_places, parts = kinds.setdefault((values.dtype, values.device), ([], []))
        all_places.extend(places)
        parts.append(values)
    wide = [torch.cat(parts).to(device, widest(device), non_blocking=True) for _, parts in kinds.values()]
    index = constant(tuple(place for places, _ in kinds.values() for place in places), device)
    return index, wide[0] if len(wide) == 1 else torch.cat(wide)


@lru_cache(maxsize=64)
def fill(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a scalar on the device, which is kept."""
    return torch.full((), value, device=device, dtype=dtype)
