"""Measures one tensor in one pass over its values, a few rows at a time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from omninorm.inspection.channels import Channels, ChannelSums
from omninorm.inspection.gains import Gains, measure_gains
from omninorm.inspection.names import Place
from omninorm.inspection.quantize import int4_error, int8_error
from omninorm.inspection.tensors import StoredTensor, as_float
from omninorm.record.tensors import FLOATS

FP16_MAX, FP16_NORMAL = 65504.0, 2.0**-14
FP16_ZERO = 2.0**-25
"""Values up to this one become 0 in fp16; it is half of the smallest subnormal number, 6e-8."""
_MATRICES = ("matrix", "embedding", "head")
# Squares and fourth powers of values outside of this range would overflow or underflow in float32.
_SAFE = (1e-6, 1e6)


@dataclass
class TensorStats:
    """Statistics of one tensor. Moments and channels exclude non-finite values.

    - max_abs is max |w|, at index argmax; rms is √mean(w²).
    - kurtosis is mean(w⁴)/mean(w²)²; it is 3 for a normal distribution.
    - fp16_subnormal and fp16_lost are the fractions of the non-zero values that are below 2⁻¹⁴ and at most 2⁻²⁵; None
      if the file's type already has fp16's range.
    - int8_error and int4_error are the RMS of the rounding error, relative to rms, of absmax quantization per row and
      per 32 values of a row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str
    place: Place
    numel: int
    measured: bool = True
    nan: int = 0
    inf: int = 0
    first_bad: tuple[int, ...] | None = None
    first_bad_value: str = ""
    zeros: int = 0
    max_abs: float = 0.0
    argmax: tuple[int, ...] | None = None
    total: float = 0.0
    rms: float = 0.0
    kurtosis: float = math.nan
    fp16_subnormal: float | None = None
    fp16_lost: float | None = None
    rows: Channels | None = None
    columns: Channels | None = None
    gains: Gains | None = None
    int8_error: float | None = None
    int4_error: float | None = None

    def to_record(self) -> dict[str, Any]:
        """Return the statistics by name; some numbers may not be finite."""
        record = asdict(self)
        place = record.pop("place")
        del record["total"]
        return {**record, "kind": self.place.kind, "layer": self.place.layer, "role": place.role}

    @property
    def is_matrix(self) -> bool:
        return self.measured and self.place.kind in _MATRICES and self.numel > 0


def measure(tensor: StoredTensor, place: Place, gain_offset: float) -> TensorStats:
    """Read the tensor once and measure it.

    Args:
        tensor: the stored tensor.
        place: its place in the model.
        gain_offset: 1 if the file stores γ − 1, as for Gemma, otherwise 0.

    Raises:
        RunError: the file is damaged.
    """
    described = (tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, tensor.file.name, place, tensor.numel)
    stats = TensorStats(*described, measured=tensor.measurable)
    if not tensor.measurable or tensor.numel == 0:
        return stats
    sums = _Pass(tensor, stats, quantize=stats.is_matrix and tensor.dtype in FLOATS)
    gain = []
    for chunk in tensor.chunks():
        finite = sums.add(as_float(chunk))
        if place.kind == "gain":
            gain.append(finite.flatten() + gain_offset)
    sums.finish(wide=tensor.dtype in ("F64", "F32", "BF16"))
    if gain:
        stats.gains = measure_gains(torch.cat(gain))
    return stats


class _Pass:
    """Running sums over the chunks of one tensor."""

    def __init__(self, tensor: StoredTensor, stats: TensorStats, quantize: bool) -> None:
        self._stats = stats
        self._quantize = quantize
        self._shape = tensor.shape
        self._seen = 0
        self._sum4 = self._error8 = self._error4 = 0.0
        self._subnormal = self._lost = 0
        self._channels = ChannelSums(tensor.columns) if stats.is_matrix else None
        self._squares = 0.0

    def add(self, chunk: Tensor) -> Tensor:
        """Measure one chunk, [rows, columns]; return it with non-finite values replaced by 0."""
        size = chunk.abs()
        row_max = size.amax(1)
        if not bool(torch.isfinite(row_max).all()):
            chunk = self._without_non_finite(chunk)
            size = chunk.abs()
            row_max = size.amax(1)
        most = float(row_max.max())
        if not _SAFE[0] <= most <= _SAFE[1]:
            chunk, size, row_max = chunk.double(), size.double(), row_max.double()
        self._note_largest(most, size)
        self._count_small(size)
        squares = size.square_()
        row_sums = squares.sum(1)
        self._squares += float(row_sums.sum(dtype=torch.float64))
        if self._channels is not None:
            self._channels.add(row_sums, squares.sum(0))
        self._stats.total += float(chunk.sum())
        self._sum4 += float(torch.dot(squares.flatten(), squares.flatten()))
        if self._quantize:
            self._error8 += int8_error(chunk, row_max)
            self._error4 += int4_error(chunk)
        self._seen += chunk.numel()
        return chunk

    def finish(self, wide: bool) -> None:
        """Turn the sums into statistics. `wide` is true if the file's type has values that fp16 lacks."""
        stats, count = self._stats, self._stats.numel - self._stats.nan - self._stats.inf
        mean_square = self._squares / count if count else math.nan
        stats.rms = math.sqrt(mean_square) if count else math.nan
        if self._squares > 0.0:
            # Two divisions, because the square of a tiny mean square would be 0.
            stats.kurtosis = self._sum4 / count / mean_square / mean_square if mean_square > 1e-150 else math.nan
        nonzero = count - stats.zeros
        if nonzero and wide:
            stats.fp16_subnormal, stats.fp16_lost = self._subnormal / nonzero, self._lost / nonzero
        if self._channels is not None:
            stats.rows, stats.columns = self._channels.finish()
        if self._quantize and self._squares > 0.0:
            stats.int8_error = math.sqrt(self._error8 / self._squares)
            stats.int4_error = math.sqrt(self._error4 / self._squares)

    def _without_non_finite(self, chunk: Tensor) -> Tensor:
        stats, bad = self._stats, ~torch.isfinite(chunk)
        nan = int(torch.isnan(chunk).sum())
        stats.nan += nan
        stats.inf += int(bad.sum()) - nan
        if stats.first_bad is None:
            where = int(bad.flatten().to(torch.uint8).argmax())
            stats.first_bad = self._index(where)
            stats.first_bad_value = str(float(chunk.flatten()[where]))
        return chunk.masked_fill(bad, 0.0)

    def _note_largest(self, most: float, size: Tensor) -> None:
        if most > self._stats.max_abs:
            self._stats.max_abs = most
            self._stats.argmax = self._index(int(size.argmax()))

    def _count_small(self, size: Tensor) -> None:
        small = int(torch.count_nonzero(size < FP16_NORMAL))
        if small:
            zeros = size.numel() - int(torch.count_nonzero(size))
            self._stats.zeros += zeros
            self._subnormal += small - zeros
            self._lost += int(torch.count_nonzero(size <= FP16_ZERO)) - zeros

    def _index(self, offset: int) -> tuple[int, ...]:
        """Return the index in the tensor of the element at `offset` in this chunk."""
        flat = self._seen + offset
        index = []
        for size in reversed(self._shape):
            flat, here = divmod(flat, size)
            index.append(here)
        return tuple(reversed(index))
