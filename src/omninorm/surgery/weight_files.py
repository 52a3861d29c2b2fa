"""Files of weights, read tensor by tensor: safetensors, and those of torch.save that hold nothing but tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from omninorm.errors import RunError
from omninorm.record.tensors import open_safetensors

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# What safetensors calls the dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """What a file says of a tensor: its dtype in safetensors' words, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class WeightFile(Protocol):
    """Tensors of a file, by name."""

    def entries(self) -> dict[str, Stored]:
        """In the order of the file.

        Raises:
            RunError: the file is damaged.
        """

    def tensor(self, name: str) -> Tensor:
        """A view of the file."""


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file, whose pages are let go with the tensors that view them."""

    path: Path

    def entries(self) -> dict[str, Stored]:
        with open_safetensors(self.path) as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            return {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}

    def tensor(self, name: str) -> Tensor:
        with open_safetensors(self.path) as file:
            found: Tensor = file.get_tensor(name)
        return found


@dataclass(frozen=True)
class PickledFile:
    """A file of torch.save. Its pickle is read by torch's restricted unpickler, which builds tensors and containers of
    them and calls nothing else; whatever it refuses is refused."""

    path: Path

    def entries(self) -> dict[str, Stored]:
        return {name: Stored(_NAMES[value.dtype], tuple(value.shape)) for name, value in self._load().items()}

    def tensor(self, name: str) -> Tensor:
        return self._load()[name].contiguous()

    def _load(self) -> dict[str, Tensor]:
        """Anew each time, since what is loaded would keep the pages of the whole file."""
        try:
            found = self._unpickle()
        except Exception as error:  # a pickle of something else, or a damaged one
            said = " ".join(str(error).split())[:160]
            raise RunError(_ONLY_TENSORS, f"{self.path.name}: {said}", _AS_SAFETENSORS) from error
        if not isinstance(found, dict):
            raise RunError(_ONLY_TENSORS, f"{self.path.name}, a {type(found).__name__}", _AS_SAFETENSORS)
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or not _plain(value):
                raise RunError(_ONLY_TENSORS, f"{self.path.name} with {name!r}", _AS_SAFETENSORS)
        return {name: value.detach() for name, value in found.items()}

    def _unpickle(self) -> object:
        try:
            return torch.load(self.path, "cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of a torch before 1.6, which can't be mapped
            return torch.load(self.path, "cpu", weights_only=True)


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ONLY_TENSORS = "a pickled file must hold tensors by name and nothing else"
_AS_SAFETENSORS = "save the model as safetensors first"


def _plain(value: Tensor) -> bool:
    return value.layout is torch.strided and value.device.type == "cpu" and value.dtype in _NAMES
