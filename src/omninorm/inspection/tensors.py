"""Tensors in files: name, shape and dtype from the header, values a few rows at a time."""

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
"""Elements read at once: 4 MiB in float32, which stay in a core's caches during the passes over them."""
# A convolution's kernel is at most this wide; the last axis of stacked experts is wider.
_WIDEST_KERNEL = 16
_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


@dataclass(frozen=True)
class StoredTensor(ABC):
    """One tensor of a checkpoint, not read yet.

    Args:
        name: in the checkpoint.
        shape: outermost axis first.
        dtype: the format's own name for it, such as "BF16" or "Q4_1".
        nbytes: in the file.
        file: that holds it.
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
        """Whether its values can be read as weights: floating-point, or quantized in a known way."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the tensor as a matrix, [stop - start, columns].

        Raises:
            RunError: the file is damaged.
        """

    @abstractmethod
    def chunks(self) -> Iterator[Tensor]:
        """Yield its values in order, [rows, columns] at a time; a vector comes as pieces of one row.

        Raises:
            RunError: the file is damaged.
        """


@dataclass(frozen=True)
class SafetensorsTensor(StoredTensor):
    """In a safetensors file, which is opened again for each tensor so that none stays mapped."""

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
    """Return the tensors of one file, in the order of their names; only the header is read.

    Raises:
        RunError: the file is missing, cut off or damaged.
        MissingExtraError: safetensors is not installed.
    """
    with open_safetensors(path) as file:
        return [_describe(path, name, file.get_slice(name)) for name in sorted(file.keys())]


def _describe(path: Path, name: str, part: Any) -> SafetensorsTensor:
    shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
    return SafetensorsTensor(name, shape, dtype, math.prod(shape) * bits(dtype) // 8, path)


def _ranges(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Index ranges over the first one or two axes, each of at most CHUNK elements where that is possible."""
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
        path: what was inspected: a file or a folder.
        format: "safetensors" or "gguf".
        tensors: in the order of their names' blocks.
        config: the model's settings beside the weights, or {}.
        notices: oddities of the files, reported as findings.
    """

    path: Path
    format: str
    tensors: list[StoredTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def as_float(chunk: Tensor) -> Tensor:
    """Return float64 as it is and everything else as float32, which holds its values exactly."""
    return chunk if chunk.dtype == torch.float64 else chunk.to(torch.float32)
