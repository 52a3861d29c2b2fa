"""Parts of stored tensors as [out, in] matrices: an expert of a stack, the q of a fused qkv, a transposed tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omninorm.inspection.tensors import CHUNK, StoredTensor, as_float


@dataclass(frozen=True)
class Part:
    """A part of a stored tensor: some or all of its rows. A vector is one column.

    Args:
        key: the common name of the part.
        tensor: the stored tensor.
        first, count: the rows of the stored matrix; None means all.
        transposed: whether the file stores [in, out].
        start, stop: the rows of the result; None means all.
        heads: the number of heads if each head's rows alternate between its two halves, as in llama.cpp; otherwise 0.
        order: for each row, the stored row; None means the stored order.
        offset: the number that a model adds to the stored values of this gain.
    """

    key: str
    tensor: StoredTensor
    first: int = 0
    count: int | None = None
    transposed: bool = False
    start: int = 0
    stop: int | None = None
    heads: int = 0
    order: tuple[int, ...] | None = None
    offset: float = 0.0

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def is_vector(self) -> bool:
        return self.shape[1] == 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self._whole_shape
        return (rows if self.stop is None else self.stop) - self.start, columns

    def chunks(self) -> Iterator[Tensor]:
        """Yield the values some rows at a time, as float32 or float64.

        Two parts of the same shape have the same chunks. If rows have to be reordered, there is only one chunk.

        Raises:
            RunError: the file is damaged.
        """
        rows, columns = self.shape
        step = max(1, CHUNK // max(columns, 1))
        whole = self._reordered() if self.transposed or self._is_column or self.heads or self.order else None
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            if whole is not None:
                yield as_float(whole[start:stop])
            else:
                first = self.first + self.start
                yield as_float(self.tensor.rows(first + start, first + stop))

    def head(self, numbers: int) -> Tensor:
        """Return whole rows with about the first `numbers` values."""
        chunk = next(self.chunks(), torch.empty(0, self.shape[1]))
        return chunk[: max(1, numbers // max(self.shape[1], 1))].flatten() + self.offset

    def values(self) -> Tensor:
        """Return all values, [rows, columns]."""
        return torch.cat(list(self.chunks()))

    @property
    def _is_column(self) -> bool:
        return len(self.tensor.shape) < 2

    @property
    def _stored_shape(self) -> tuple[int, int]:
        return self.tensor.row_count if self.count is None else self.count, self.tensor.columns

    @property
    def _whole_shape(self) -> tuple[int, int]:
        rows, columns = self._stored_shape
        return (columns, rows) if self.transposed or self._is_column else (rows, columns)

    def _reordered(self) -> Tensor:
        rows, _ = self._stored_shape
        whole = self.tensor.rows(self.first, self.first + rows)
        whole = whole.T if self.transposed or self._is_column else whole
        whole = whole[self.start : self.stop]
        if self.order is not None:
            return whole[list(self.order)]
        return _halves_first(whole, self.heads) if self.heads else whole


def _halves_first(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of every head from (x₀, y₀, x₁, y₁, …) to (x₀, x₁, …, y₀, y₁, …)."""
    count, width = rows.shape
    return rows.reshape(heads, count // heads // 2, 2, width).transpose(1, 2).reshape(count, width)


def experts(part: Part, key_of: str) -> list[Part]:
    """Return the parts of a stack of experts, [experts, rows, columns], or of their biases, [experts, rows]."""
    shape = part.tensor.shape
    if len(shape) == 2:
        return [replace(part, key=f"{key_of}#{i}", first=i, count=1, transposed=True) for i in range(shape[0])]
    rows = part.tensor.row_count // max(shape[0], 1)
    return [replace(part, key=f"{key_of}#{i}", first=i * rows, count=rows) for i in range(shape[0])]


def split(part: Part, keys: list[str], sizes: list[int]) -> list[Part]:
    """Return consecutive rows of a fused part as separate parts."""
    found, start = [], part.start
    for key, size in zip(keys, sizes, strict=True):
        found.append(replace(part, key=key, start=start, stop=start + size))
        start += size
    return found
