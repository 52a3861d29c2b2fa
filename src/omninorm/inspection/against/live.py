"""Presents the weights of a module in memory as tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import InputError
from omninorm.inspection.tensors import CHUNK, Checkpoint, StoredTensor

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class ModuleTensor(StoredTensor):
    """A parameter or buffer of a module."""

    value: Tensor = field(repr=False, compare=False)

    @property
    def measurable(self) -> bool:
        return self.value.dtype.is_floating_point and self.value.device.type != "meta"

    def rows(self, start: int, stop: int) -> Tensor:
        return self.value.reshape(-1, self.columns)[start:stop].cpu()

    def chunks(self) -> Iterator[Tensor]:
        step = max(1, CHUNK // max(self.columns, 1))
        for start in range(0, self.row_count, step):
            yield self.rows(start, start + step)


def open_module(module: nn.Module) -> Checkpoint:
    """Return a module's state dict as a checkpoint, with the settings in `module.config`, if there are any.

    Raises:
        InputError: the module has no tensors.
    """
    label = Path(type(module).__name__)
    tensors: list[StoredTensor] = [
        _describe(label, name, value.detach()) for name, value in module.state_dict().items() if _plain(value)
    ]
    if not tensors:
        raise InputError("The module must have parameters", type(module).__name__, "pass the whole model")
    return Checkpoint(label, "module", tensors, _settings(module))


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _describe(label: Path, name: str, value: Tensor) -> ModuleTensor:
    dtype = _NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return ModuleTensor(name, tuple(value.shape), dtype, value.numel() * value.element_size(), label, value)


def _settings(module: nn.Module) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    to_dict = getattr(config, "to_dict", None)
    found = to_dict() if callable(to_dict) else config
    if is_dataclass(config) and not isinstance(config, type):
        found = {"model": asdict(config)}
    return found if isinstance(found, Mapping) else {}
