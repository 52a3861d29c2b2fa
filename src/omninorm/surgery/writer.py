"""Writes and hashes safetensors piece by piece; the library's own writer needs the whole file in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from omninorm.record.files import write_all
from omninorm.record.tensors import bits
from omninorm.surgery.weight_files import Stored

_PIECE = 2**22
_AHEAD = 4  # queued steps, two for each piece


def size(stored: Stored) -> int:
    """Return the bytes that a tensor takes."""
    return prod(stored.shape) * bits(stored.dtype) // 8


class Writer:
    """A safetensors file that grows tensor by tensor, written by one thread and hashed by another.

    Args:
        path: the file, which must not exist yet; None only computes hashes.
        entries: its tensors, in the order in which they will be added.
    """

    def __init__(self, path: Path | None, entries: Mapping[str, Stored]) -> None:
        self.hashes: dict[str, str] = {}
        self._digest = hashlib.sha256()
        self._file = None if path is None else open(path, "xb", buffering=0)  # noqa: SIM115  closed on leaving
        self._writing, self._hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._later(self._writing, self._write, _header(entries))

    def add(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Add the next tensor; its pieces must not be changed afterwards.

        Raises:
            OSError: an earlier piece could not be written.
        """
        for piece in pieces:
            content = as_bytes(piece)
            self._later(self._hashing, self._hash, content)
            self._later(self._writing, self._write, content)
        self._later(self._hashing, self._finish, name)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            while error is None and self._waiting:
                self._waiting.popleft().result()
            if error is None and self._file is not None:
                os.fsync(self._file.fileno())
        finally:
            for thread in (self._writing, self._hashing):
                thread.shutdown(cancel_futures=True)
            if self._file is not None:
                self._file.close()

    def _later(self, thread: ThreadPoolExecutor, step: Callable[..., None], *arguments: object) -> None:
        self._waiting.append(thread.submit(step, *arguments))
        if len(self._waiting) > _AHEAD:
            self._waiting.popleft().result()

    def _write(self, content: bytes | memoryview) -> None:
        if self._file is not None:
            write_all(self._file.fileno(), content)

    def _hash(self, content: memoryview) -> None:
        self._digest.update(content)

    def _finish(self, name: str) -> None:
        self.hashes[name], self._digest = self._digest.hexdigest(), hashlib.sha256()


def pieces(value: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's elements, a few megabytes at a time."""
    flat = value.contiguous().view(-1)
    step = max(1, _PIECE // value.element_size())
    yield from (flat[start : start + step] for start in range(0, len(flat), step))


def as_bytes(value: Tensor) -> memoryview:
    """Return a contiguous tensor's memory."""
    return value.reshape(-1).view(torch.uint8).numpy().data


def _header(entries: Mapping[str, Stored]) -> bytes:
    """Return the header: the length of a JSON object in eight little-endian bytes, and the object."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, stored in entries.items():
        end = start + size(stored)
        table[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
