"""Reads the loss and the gradient norm of every step from the device: on a GPU one step late, otherwise immediately.

While the host waits for the numbers of a step, a GPU already works on the next one, so it never runs out of work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from omninorm.experiments.events import StopEvent

# After this many skipped steps in a row, the loss scale is below 2⁻⁸, so it cannot be the reason for the overflow.
MOST_SKIPPED = 24
# If a read takes longer than this many seconds, the host has waited for the device.
_WAITED = 1e-4


class Reading:
    """Loss and gradient norm of a step, which are being copied to the host.

    Args:
        step: the number of the step, from 1.
        lr: the step's learning rate.
        started: the time at which the step began, by time.perf_counter.
        loss, grad_norm: scalars on the device.

    Attributes:
        submitted: the time at which the host had submitted the whole step; set by `Readings.add`.
    """

    submitted: float

    def __init__(self, step: int, lr: float, started: float, loss: Tensor, grad_norm: Tensor) -> None:
        self.step, self.lr, self.started = step, lr, started
        self._both = torch.stack((loss, grad_norm.to(loss.dtype)))
        self._copied: torch.cuda.Event | None = None
        self._values: list[float] | None = None
        if self._both.is_cuda:  # to pinned memory
            self._both = self._both.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @property
    def loss(self) -> float:
        return self._read()[0]

    @property
    def grad_norm(self) -> float:
        return self._read()[1]

    def end(self) -> StopEvent:
        """Return the event that ends a run which diverges in this step."""
        return StopEvent(self.step, "diverged", self.loss, self.grad_norm)

    def _read(self) -> list[float]:
        if self._values is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._values = self._both.tolist()
        return self._values


Report = Callable[[Reading, float], None]
"""A function that is called with each step whose numbers were finite, and its duration in seconds."""


class Readings:
    """Reads the steps in order, and detects the one in which a run diverges.

    A run diverges if the loss or the gradient norm is not finite. With float16, the loss scaler skips steps whose
    gradients overflow; then a non-finite gradient norm counts only after more than MOST_SKIPPED skipped steps in a row.

    Args:
        late: read each step only after the next one has been submitted.
        scaled: whether a loss scaler skips steps.
        report: called with each step.
    """

    def __init__(self, late: bool, scaled: bool, report: Report) -> None:
        self.late = late
        self._scaled = scaled
        self._report = report
        self._waiting: list[Reading] = []
        self._skipped = 0
        self._last = 0.0

    def check_at_once(self, reading: Reading) -> StopEvent | None:
        """Return the end of the run if it diverges in this step, before the weights change; None if read late."""
        return None if self.late or not self._diverges(reading) else reading.end()

    def add(self, reading: Reading) -> StopEvent | None:
        """Add a step; report it, or the previous one if steps are read late. Return the end if the run diverged."""
        reading.submitted = time.perf_counter()
        self._waiting.append(reading)
        return self._finish(1 if self.late else 0)

    def settle(self) -> StopEvent | None:
        """Report all steps so far; return the end if the run diverged in one of them."""
        return self._finish(0)

    def _finish(self, left: int) -> StopEvent | None:
        while len(self._waiting) > left:
            reading, before = self._waiting.pop(0), time.perf_counter()
            if self._diverges(reading):
                return reading.end()
            self._skipped = 0 if math.isfinite(reading.grad_norm) else self._skipped + 1
            end = self._end(reading, before, time.perf_counter())
            self._report(reading, end - max(reading.started, self._last))
            self._last = end
        return None

    def _end(self, reading: Reading, before: float, now: float) -> float:
        """Return the time at which the step ended: now if the host had to wait, otherwise when it was submitted.

        If the host does not wait, the device is as fast as the host."""
        return now if now - before > _WAITED or reading.submitted <= self._last else reading.submitted

    def _diverges(self, reading: Reading) -> bool:
        if not math.isfinite(reading.loss):
            return True
        return not math.isfinite(reading.grad_norm) and not (self._scaled and self._skipped < MOST_SKIPPED)
