"""Tensors in files: the header gives name, shape and dtype, and the values are read a few rows at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omninorm.record.tensors import FLOATS, bits, open_safetensors

CHUNK = 1 << 20
"""The number of elements that are read at a time: 4 MiB in float32, which fit into a core's caches."""
# The last axis of a convolution's kernel is at most this long; that of stacked experts is longer.
_WIDEST_KERNEL = 16
_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


@dataclass(frozen=True)
class StoredTensor(ABC):
    """A tensor of a checkpoint whose values have not been read yet.

    Args:
        name: the name in the checkpoint.
        shape: the shape, outermost axis first.
        dtype: the name of the dtype in this format, such as "BF16" or "Q4_1".
        nbytes: the number of bytes in the file.
        file: the file that contains it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Width of the tensor as a matrix: [out, in], [out, in·kernel] or [experts·rows, in]."""
        if len(self.shape) < 2:
            return self.numel
        kernel = len(self.shape) > 2 and self.shape[-1] <= _WIDEST_KERNEL
        return self.numel // self.shape[0] if kernel else self.shape[-1]

    @property
    def row_count(self) -> int:
        """Rows of the tensor as a matrix; a vector is one row."""
        return self.numel // self.columns if self.columns else 0

    @property
    @abstractmethod
    def measurable(self) -> bool:
        """Return whether the values can be read as weights: they are floating-point, or quantized in a known way."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the tensor as a matrix, [stop - start, columns].

        Raises:
            RunError: the file is damaged.
        """

    @abstractmethod
    def chunks(self) -> Iterator[Tensor]:
        """Yield the values in order, as matrices [rows, columns]; a vector is split into pieces of one row.

        Raises:
            RunError: the file is damaged.
        """


@dataclass(frozen=True)
class SafetensorsTensor(StoredTensor):
    """A tensor in a safetensors file, which is opened for each tensor, so that it does not stay mapped."""

    @property
    def measurable(self) -> bool:
        return self.dtype in FLOATS or self.dtype in _FLOAT8

    def rows(self, start: int, stop: int) -> Tensor:
        with open_safetensors(self.file) as file:
            if len(self.shape) < 2:
                whole: Tensor = file.get_tensor(self.name)
                return whole.reshape(1, -1)[start:stop]
            part = file.get_slice(self.name)
            if self.row_count == self.shape[0]:
                piece: Tensor = part[start:stop]
                return piece.reshape(-1, self.columns)
            inner = self.row_count // self.shape[0]
            first, last = start // inner, -(-stop // inner)
            piece = part[first:last]
            return piece.reshape(-1, self.columns)[start - first * inner : stop - first * inner]

    def chunks(self) -> Iterator[Tensor]:
        with open_safetensors(self.file) as file:
            if not self.shape:
                yield file.get_tensor(self.name).reshape(1, 1)
                return
            part = file.get_slice(self.name)
            for index in _ranges(self.shape):
                piece: Tensor = part[index]
                yield piece.reshape(1, -1) if len(self.shape) == 1 else piece.reshape(-1, self.columns)


def read_safetensors(path: Path) -> list[SafetensorsTensor]:
    """Return the tensors of one file, in the order of their names. Only the header is read.

    Raises:
        RunError: the file is missing, truncated or damaged.
        MissingExtraError: safetensors is not installed.
    """
    with open_safetensors(path) as file:
        return [_describe(path, name, file.get_slice(name)) for name in sorted(file.keys())]


def _describe(path: Path, name: str, part: Any) -> SafetensorsTensor:
    shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
    return SafetensorsTensor(name, shape, dtype, math.prod(shape) * bits(dtype) // 8, path)


def _ranges(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield index ranges over the first one or two axes, each of at most CHUNK elements if possible."""
    inner = math.prod(shape[1:])
    if len(shape) > 2 and inner > CHUNK and shape[-1] > _WIDEST_KERNEL:
        for index in range(shape[0]):
            for rest in _ranges(shape[1:]):
                yield (slice(index, index + 1), *rest)
        return
    step = max(1, CHUNK // max(inner, 1))
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])),)


@dataclass
class Checkpoint:
    """A checkpoint whose headers have been read.

    Args:
        path: the file or folder.
        format: "safetensors" or "gguf".
        tensors: the tensors, in the order of the blocks in their names.
        config: the model's settings, which are stored with the weights, or {}.
        notices: oddities of the files, which are reported as findings.
    """

    path: Path
    format: str
    tensors: list[StoredTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def as_float(chunk: Tensor) -> Tensor:
    """Return float64 tensors unchanged and all others in float32, which represents their values exactly."""
    return chunk if chunk.dtype == torch.float64 else chunk.to(torch.float32)
