"""What a benchmark measures, as plain settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from omninorm.config import check_choice, check_count, check_keys, check_number
from omninorm.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BenchConfig:
    """The settings of a benchmark.

    Args:
        rows, widths: the sizes, every one with every other.
        dtypes: of "fp32", "bf16" and "fp16". In fp16 only the forward pass is measured.
        threads: how many threads each; the first measures every size, further ones the largest number of rows.
        seconds: for the rounds of one case, at least 7 of which are done.
        compile: whether torch.compile takes part, which has to run a C++ compiler.
        models: whether whole models are measured.
        patience: seconds that one model may take; slower ones are skipped, with the reason.

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
        for name in ("rows", "widths", "dtypes", "threads"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} must name at least one value, each once", repr(values), f"pass --{name}")
        for name in ("rows", "widths", "threads"):
            for value in getattr(self, name):
                check_count(name, value)
        for name in self.dtypes:
            check_choice("dtypes", name, tuple(DTYPES))
        check_number("seconds", self.seconds, above=0.0)
        check_number("patience", self.patience, above=0.0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchConfig:
        """Reads what `to_dict` writes.

        Raises:
            ConfigError: not a mapping, an unknown key, or a bad value.
        """
        check_keys("a benchmark's settings", values, [field.name for field in fields(cls)])
        chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """Every setting under its name: JSON without further ado."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def all_threads() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
