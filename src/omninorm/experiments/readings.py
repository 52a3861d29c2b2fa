"""The loss and the gradient norm of every step, read from the device: at once on a CPU, one step late on a GPU.

A GPU works on the next step while the host reads, so that it never runs out of work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from omninorm.experiments.events import StopEvent

# After as many skipped steps in a row the scale of the loss is below 2⁻⁸, so that overflow is not the scale's fault.
MOST_SKIPPED = 24
# A read that takes longer has waited for the device.
_WAITED = 1e-4


class Reading:
    """Loss and gradient norm of a step, on their way to the host.

    Args:
        step: the step, from 1.
        lr: its learning rate.
        started: when it began, by time.perf_counter.
        loss, grad_norm: scalars on the device.

    Attributes:
        submitted: when the host had submitted the whole step; set by `Readings.add`.
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
        """Return the end of a run that diverges in this step."""
        return StopEvent(self.step, "diverged", self.loss, self.grad_norm)

    def _read(self) -> list[float]:
        if self._values is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._values = self._both.tolist()
        return self._values


Report = Callable[[Reading, float], None]
"""Called with each step that was finite, and its duration in seconds."""


class Readings:
    """Reads the steps in order, and finds the one in which a run diverges.

    With float16, whose scaler skips steps with overflowing gradients, a run diverges in a step only if its loss is not
    finite, or if the scaler has skipped more than MOST_SKIPPED steps in a row.

    Args:
        late: read each step after the next one has been submitted.
        scaled: whether a scaler skips steps.
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
        """Return the end of the run if a step has diverged, before the weights change; None if it is read later."""
        return None if self.late or not self._diverges(reading) else reading.end()

    def add(self, reading: Reading) -> StopEvent | None:
        """Report the step, or if it is read later, the one before; return the end of the run if that diverged."""
        reading.submitted = time.perf_counter()
        self._waiting.append(reading)
        return self._finish(1 if self.late else 0)

    def settle(self) -> StopEvent | None:
        """Report every step so far; return the end of the run if one diverged."""
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
        """Return when the step ended: now if the host has waited for it, and when it was submitted if the device keeps
        pace with the host."""
        return now if now - before > _WAITED or reading.submitted <= self._last else reading.submitted

    def _diverges(self, reading: Reading) -> bool:
        if not math.isfinite(reading.loss):
            return True
        return not math.isfinite(reading.grad_norm) and not (self._scaled and self._skipped < MOST_SKIPPED)
