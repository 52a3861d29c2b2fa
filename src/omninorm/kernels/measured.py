"""The table of measurements that chooses the back end of norms on GPUs: `measured.json`.

Each measurement is an object:

- device: a pattern of the device's name, such as "NVIDIA H100*";
- operator: "rms_norm" or "layer_norm", which includes the backward pass. The add_ variants follow the norm, so that
  they keep the bits of the two separate steps;
- dtype: the dtype of x, such as "bfloat16";
- width, rows: the shape that was timed;
- compiled: true if it was timed under torch.compile, where "triton" means an operator that Inductor cannot fuse;
- backend: "triton" if neither the GPU nor the host took longer with it than with "torch", otherwise "torch";
- run: the file with the results of the run that measured it.

The host's time counts because small models, small batches and generation are limited by it; there it is many times the
difference on the GPU.

A measurement applies to widths from its own up to the next larger one. The choice never depends on the number of rows,
since otherwise the bits of a row would depend on the size of its batch. So "triton" is chosen only if it was faster for
every number of rows that was timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omninorm.errors import ConfigError
from omninorm.kernels.constants import constant_in_graphs

FILE = Path(__file__).parent / "measured.json"
BACKENDS = ("torch", "triton")


class Measurement(NamedTuple):
    """One row of the table; the module's docstring describes the fields."""

    device: str
    operator: str
    dtype: str
    width: int
    rows: int
    backend: str
    run: str
    compiled: bool = False


class Choice(NamedTuple):
    """A back end and the sentence that explains it."""

    backend: str
    reason: str


_VALID: dict[str, Callable[[Any], bool]] = {
    "device": lambda value: isinstance(value, str) and bool(value),
    "operator": lambda value: value in ("rms_norm", "layer_norm"),
    "dtype": lambda value: value in ("bfloat16", "float16", "float32", "float64"),
    "width": lambda value: type(value) is int and value > 0,
    "rows": lambda value: type(value) is int and value > 0,
    "backend": lambda value: value in BACKENDS,
    "run": lambda value: isinstance(value, str) and bool(value),
    "compiled": lambda value: isinstance(value, bool),
}


def read_table(path: Path = FILE) -> tuple[str, list[Measurement]]:
    """Return the default back end and the measurements of a table.

    Raises:
        ConfigError: a measurement lacks a field, or a value is not one that the module's docstring describes.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    _check("default", table.get("default"), table.get("default") in BACKENDS, path)
    return table["default"], [_measurement(entry, path) for entry in table["measurements"]]


def _measurement(entry: dict[str, Any], path: Path) -> Measurement:
    for name in entry.keys() | {name for name in _VALID if name != "compiled"}:
        value = entry.get(name)
        _check(name, value, name in _VALID and _VALID[name](value), path)
    return Measurement(**entry)


def _check(name: str, value: object, is_valid: bool, path: Path) -> None:
    if not is_valid:
        remedy = "compare the entry with the fields that kernels/measured.py describes"
        raise ConfigError(f"{path.name} must hold valid measurements", f"{name}={value!r}", remedy)


DEFAULT, MEASUREMENTS = read_table()
# True if the table chooses the default for every tensor, so that calls need not look it up.
ALWAYS_DEFAULT = all(each.backend == DEFAULT for each in MEASUREMENTS)


def choose(operator: str, x: Tensor, compiled: bool = False) -> Choice:
    """Return the back end for a norm of x, a tensor on a GPU, with the reason."""
    if ALWAYS_DEFAULT:
        return Choice(DEFAULT, f"the default {DEFAULT!r}: on no GPU was another measured to be better for GPU and host")
    if compiled:
        return _constant_choice(operator, x.device, x.dtype, int(x.shape[-1]))
    return _chosen(operator, x.device, x.dtype, x.shape[-1], compiled)


@constant_in_graphs
def _constant_choice(operator: str, device: torch.device, dtype: torch.dtype, width: int) -> Choice:
    """Choose a back end. Dynamo calls this instead of tracing it; it would trace the search and ignore its cache."""
    return _chosen(operator, device, dtype, width, True)


@lru_cache(maxsize=4096)
def _chosen(operator: str, device: torch.device, dtype: torch.dtype, width: int, compiled: bool) -> Choice:
    return search(operator, device_name(device), str(dtype).removeprefix("torch."), width, compiled)


def search(operator: str, device: str, dtype: str, width: int, compiled: bool) -> Choice:
    """Return the choice for the largest measured width that is not above `width`."""
    wanted = operator, dtype, compiled
    fitting = [
        each
        for each in MEASUREMENTS
        if (each.operator, each.dtype, each.compiled) == wanted and fnmatchcase(device, each.device)
    ]
    below = [each.width for each in fitting if each.width <= width]
    nearest = [each for each in fitting if each.width == max(below)] if below else []
    if not nearest:
        return Choice(DEFAULT, f"no measurement of {operator} in {dtype} and width {width} on {device}")
    names = {each.backend for each in nearest}
    backend = "triton" if names == {"triton"} else "torch"
    rows = ", ".join(str(each.rows) for each in nearest)
    return Choice(backend, f"measured on {device} at width {nearest[0].width} and {rows} rows ({nearest[0].run})")


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """Return the name of a GPU, such as "NVIDIA H100 80GB HBM3", or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
