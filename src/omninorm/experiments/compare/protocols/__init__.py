"""The protocols. Each is a function that takes a cell, its text and a device, and returns a Measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from omninorm.device import device_name
from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.protocols import init, ramp, speed, train
from omninorm.experiments.corpus import Corpus
from omninorm.experiments.memory import fitting, step_does_not_fit

MEASURE: dict[str, Callable[[Cell, Corpus, torch.device], Measurement]] = {
    "init": init.measure,
    "ramp": ramp.measure,
    "train": train.measure,
    "speed": speed.measure,
}


def measure(cell: Cell, corpus: Corpus, device: torch.device) -> Measurement:
    """Return the measurement of a cell, with the device among the values that depend on the machine.

    Raises:
        ConfigError: a step does not fit in the memory of the device.
        Exception: any exception that the cell's model raises.
    """
    with fitting(step_does_not_fit(cell.plan.train, device)):
        measured = MEASURE[cell.protocol](cell, corpus, device)
    return replace(measured, clock={**measured.clock, "device": device_name(device)})
