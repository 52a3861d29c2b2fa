"""Weight files read tensor by tensor: safetensors, and files of torch.save that hold nothing but tensors."""

from __future__ import annotations

from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from pickletools import genops
from typing import IO, Protocol, cast

import torch
from torch import Tensor

from omninorm.errors import RunError
from omninorm.record.tensors import open_safetensors

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Dtypes by their names in safetensors.
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
    """A tensor's dtype, by its name in safetensors, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class WeightFile(Protocol):
    """Tensors of a file, by name."""

    def entries(self) -> dict[str, Stored]:
        """Return the tensors in the order of the file.

        Raises:
            RunError: the file is damaged.
        """

    def tensor(self, name: str) -> Tensor:
        """Return a view of the file."""


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file, whose pages are released with the tensors that view them."""

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
    """A file of torch.save, read by torch's restricted unpickler (weights_only), which runs no code."""

    path: Path

    def entries(self) -> dict[str, Stored]:
        return {name: Stored(_NAMES[value.dtype], tuple(value.shape)) for name, value in self._load().items()}

    def tensor(self, name: str) -> Tensor:
        return self._load()[name].contiguous()

    def _load(self) -> dict[str, Tensor]:
        """Load it again each time, because a loaded tensor keeps the pages of the whole file in memory."""
        try:
            found = self._unpickle()
        except Exception as error:  # a pickle of something else, or a damaged one
            said = f"{' '.join(str(error).split()):.160}"
            raise RunError(f"{self.path} {_ONLY_TENSORS} ({said})", "", _AS_SAFETENSORS) from error
        if not isinstance(found, dict):
            raise RunError(f"{self.path} {_ONLY_TENSORS}", f"a {type(found).__name__}", _AS_SAFETENSORS)
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or not _plain(value):
                raise RunError(f"{self.path} {_ONLY_TENSORS}", f"{name!r:.80} in it", _AS_SAFETENSORS)
        return {name: value.detach() for name, value in found.items()}

    def _unpickle(self) -> object:
        try:
            return torch.load(self.path, "cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of a torch before 1.6, whose tensors can't be mapped
            with open(self.path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                stream = cast(IO[bytes], content)
                _check_sizes(stream, content.size())
                return torch.load(stream, "cpu", weights_only=True)


def _check_sizes(stream: IO[bytes], size: int) -> None:
    """Refuse a damaged number in a file of a torch before 1.6, for which torch would allocate that much memory.

    Three pickles with the format come before the one of the tensors, in which no number is larger than the file.
    """
    for _ in range(3):
        for _ in genops(stream):
            pass
    sizes = (argument for _, argument, _ in genops(stream) if isinstance(argument, int))
    if max(sizes, default=0) > size:
        raise ValueError("a size in it is larger than the file")
    stream.seek(0)


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ONLY_TENSORS = "must hold tensors by name and nothing else"
_AS_SAFETENSORS = "save the model as safetensors first"


def _plain(value: Tensor) -> bool:
    """Return whether a tensor is dense, on the CPU, and no view that claims more elements than it stores."""
    if value.layout is not torch.strided or value.device.type != "cpu" or value.dtype not in _NAMES:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
