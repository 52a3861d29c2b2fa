"""The protocols: each is a function from a cell and its text to a Measurement."""

from __future__ import annotations

from collections.abc import Callable

from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.protocols import init, ramp, speed, train
from omninorm.experiments.corpus import Corpus

MEASURE: dict[str, Callable[[Cell, Corpus], Measurement]] = {
    "init": init.measure,
    "ramp": ramp.measure,
    "train": train.measure,
    "speed": speed.measure,
}
