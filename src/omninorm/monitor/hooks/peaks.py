"""Hooks that only measure the largest |y| of a module's output, which is all that a step without a sample needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from omninorm.monitor.hooks.hook import Hook
from omninorm.monitor.hooks.training_pass import Gate
from omninorm.monitor.probes.block import LARGE, some_rows
from omninorm.monitor.stats_buffer import StatsBuffer
from omninorm.monitor.tensors import first_tensor


class OnlyPeaks:
    """Measures outputs in steps without a sample.

    Args:
        safely: measures without a graph, and keeps errors from the training.
        failed: called with a monitoring error.

    Attributes:
        wanted: whether a training forward pass of the model is running in such a step.
    """

    def __init__(
        self,
        gate: Gate,
        buffer: StatsBuffer,
        safely: Callable[[Callable[[], None]], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._gate, self._buffer, self._safely, self._failed = gate, buffer, safely, failed
        self.wanted = False

    def begin(self) -> None:
        """Begin a forward pass of the model."""
        self.wanted = bool(self._gate.inside) and not self._buffer.sampling and self._gate.is_open()

    def see(self, place: int, y: Tensor | None) -> None:
        """Measure the output y of the sentinel at this place."""
        if y is None or not self._gate.is_open():
            return
        if type(y) is not Tensor or y.numel() > LARGE or torch._C._len_torch_function_stack() > 0:
            self._safely(lambda: self._buffer.sentinel(place, y if y.numel() <= LARGE else some_rows(y)))
            return
        try:  # without the context managers of `safely`, which would take longer than the measurement
            self._buffer.sentinel(place, y)
        except Exception as error:
            self._failed(error)


class OutputHook(Hook):
    """A hook after a module's forward, which takes a short way in steps without a sample.

    Args:
        place: of the module among the sentinels.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module, peaks: OnlyPeaks, place: int) -> None:
        super().__init__(function, module)
        self._peaks, self._place = peaks, place

    def __call__(self, *args: Any) -> Any:
        if is_compiling() or not self._peaks.wanted:
            return super().__call__(*args)
        self._peaks.see(self._place, first_tensor(args[-1]))
        return None
