"""Settings of the benchmark."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from omninorm.config import check_choice, check_count, check_keys, check_number, store_python_numbers
from omninorm.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BenchConfig:
    """The settings of a benchmark.

    Args:
        rows, widths: the sizes; all combinations are measured.
        dtypes: some of "fp32", "bf16" and "fp16". In fp16 only the forward pass is measured.
        threads: thread counts. All sizes are measured with the first one, but only the largest row count with the
            others.
        seconds: time budget per case, which has at least 7 rounds.
        compile: whether to measure torch.compile, which needs a C++ compiler.
        models: whether to measure whole models.
        patience: time limit for a whole model, in seconds; slower models are skipped with the reason.

    Raises:
        ConfigError: an empty list, an unknown dtype, or a number out of range.
    """

    rows: tuple[int, ...] = (512, 2048)
    widths: tuple[int, ...] = (576, 1024, 2048, 4096)
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    threads: tuple[int, ...] = (1,)
    seconds: float = 0.7
    compile: bool = True
    models: bool = True
    patience: float = 150.0

    def __post_init__(self) -> None:
        store_python_numbers(self)
        for name in ("rows", "widths", "dtypes", "threads"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                remedy = f"pass --{name} with different values separated by commas"
                raise ConfigError(f"{name} must have at least one value and no value twice", repr(values), remedy)
        for name in ("rows", "widths", "threads"):
            for value in getattr(self, name):
                check_count(name, value)
        for name in self.dtypes:
            check_choice("dtypes", name, tuple(DTYPES))
        check_number("seconds", self.seconds, above=0.0)
        check_number("patience", self.patience, above=0.0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchConfig:
        """Return the settings that a dictionary such as `to_dict`'s describes.

        Raises:
            ConfigError: `values` is not a mapping, or has an unknown key or an invalid value.
        """
        check_keys("A benchmark's settings", values, [field.name for field in fields(cls)])
        chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a JSON-serializable dictionary."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def all_threads() -> int:
    """Return the number of cores that this process may use; the machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
