"""Reads the header of a GGUF file: its settings and the positions of its tensors. Sizes beyond the file are refused.

magic, version, number of tensors, number of settings
settings   name, type, value; arrays (a tokenizer's vocabulary) are skipped
tensors    name, shape from the innermost axis, type, offset
data       from the next multiple of general.alignment
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_AXES, _DEEPEST_ARRAY = 8, 4
# A limit for the items of all arrays of strings or arrays. A vocabulary has a few hundred thousand tokens and twice as
# many merges.
_MOST_ITEMS = 2**21
# The codes of the module struct for the scalar types, by their numbers in the file.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in the header: shape from the outermost axis, number of its type, position of its first byte."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """The settings without arrays, the tensors, and the byte order in struct's notation, "<" or ">"."""

    settings: Mapping[str, Any]
    tensors: Sequence[TensorEntry]
    order: Literal["<", ">"]


def read_header(content: Any) -> Header:
    """Read the header of a file.

    Args:
        content: the bytes of the file, usually mapped.

    Raises:
        ValueError: the file is not a GGUF file or is damaged; the message explains how.
    """
    if bytes(content[:4]) != MAGIC:
        raise ValueError("it does not start with the letters GGUF")
    reader = _Reader(content, 4)
    if reader.number("I") not in _VERSIONS:
        reader = _Reader(content, 4, ">")
        if (version := reader.number("I")) not in _VERSIONS:
            raise ValueError(f"its version {version} is unknown")
    tensor_count, setting_count = reader.number("Q"), reader.number("Q")
    settings: dict[str, Any] = {}
    for _ in range(setting_count):  # if the count is too large, this ends at the end of the file
        name = reader.string()
        if name in settings:
            raise ValueError(f"its setting {name!r:.80} appears twice")
        settings[name] = reader.value(reader.number("I"))
    entries = [reader.tensor() for _ in range(tensor_count)]
    start = reader.at + -reader.at % _alignment(settings)
    tensors = [TensorEntry(name, shape, kind, start + offset) for name, shape, kind, offset in entries]
    if len({entry.name for entry in tensors}) < len(tensors):
        raise ValueError("a tensor appears twice")
    return Header({name: value for name, value in settings.items() if value is not None}, tensors, reader.order)


def _alignment(settings: Mapping[str, Any]) -> int:
    found = settings.get("general.alignment", _ALIGNMENT)
    if not isinstance(found, int) or found < 1 or found & (found - 1):
        raise ValueError(f"its general.alignment is {found!r:.80}, not a power of two")
    return found


class _Reader:
    """Reads values one after the other; raises ValueError if the file ends too early."""

    def __init__(self, content: Any, at: int, order: Literal["<", ">"] = "<") -> None:
        self.content, self.at, self.order = content, at, order
        self.items = 0  # the number of array items that were skipped one by one

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"{self.order}{code}")
        return struct.unpack(f"{self.order}{code}", self._take(size))[0]

    def string(self) -> str:
        try:
            return self._take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise ValueError("a name in its header is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """Return a number or a string, or None for an array, which is skipped."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            self._skip_array(0)
            return None
        if kind not in _SCALARS:
            raise ValueError(f"a setting has the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return a tensor's name, shape from the outermost axis, type, and offset in the data."""
        name, axes = self.string(), self.number("I")
        if not 1 <= axes <= _MOST_AXES:
            raise ValueError(f"its tensor {name!r:.80} has {axes} axes")
        shape = [self.number("Q") for _ in range(axes)]
        return name, tuple(reversed(shape)), self.number("I"), self.number("Q")

    def _skip_array(self, depth: int) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(f"{self.order}{_SCALARS[kind]}"))
            return
        self.items += count
        if self.items > _MOST_ITEMS:
            raise ValueError(f"its arrays claim {self.items} items, and at most {_MOST_ITEMS} are supported")
        if kind == _STRING:
            for _ in range(count):
                self._skip(self.number("Q"))
        elif kind == _ARRAY and depth < _DEEPEST_ARRAY:
            for _ in range(count):
                self._skip_array(depth + 1)
        else:
            raise ValueError(f"an array has the unknown type {kind}")

    def _take(self, size: int) -> bytes:
        start = self.at
        self._skip(size)
        return bytes(self.content[start : self.at])

    def _skip(self, size: int) -> None:
        if size > len(self.content) - self.at:
            raise ValueError("it ends within its header")
        self.at += size


def bytes_of(entry: TensorEntry, block: int, size: int, length: int) -> tuple[int, tuple[int, ...]]:
    """Return the number of a tensor's bytes, and its shape with rows in bytes.

    Args:
        entry: the tensor.
        block, size: the numbers and the bytes in a block of its type.
        length: the length of the file.

    Raises:
        ValueError: its rows do not consist of whole blocks, or it reaches beyond the end of the file.
    """
    if entry.shape[-1] % block:
        raise ValueError(f"the rows of its tensor {entry.name!r:.80} are not a multiple of {block} numbers")
    rows = (*entry.shape[:-1], entry.shape[-1] // block * size)
    if entry.start + math.prod(rows) > length:
        raise ValueError(f"its tensor {entry.name!r:.80} reaches beyond the end of the file")
    return math.prod(rows), rows
