"""Reads tensors that MLX quantized: packed integers, with a scale and a bias for each group in a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omninorm.inspection.tensors import CHUNK, Checkpoint, StoredTensor
from omninorm.record.tensors import open_safetensors

if TYPE_CHECKING:
    import numpy as np

_WORD = 32  # the bits of a packed integer
_GROUP = 64  # MLX's default group size
_WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class MLXTensor(StoredTensor):
    """A quantized matrix: w = scale · q + bias, where q are unsigned integers of `bits` bits, lowest bits first."""

    packed: StoredTensor = field(repr=False)
    scales: StoredTensor = field(repr=False)
    biases: StoredTensor = field(repr=False)
    bits: int

    @property
    def measurable(self) -> bool:
        return True

    def rows(self, start: int, stop: int) -> Tensor:
        packed = _rows(self.packed, start, stop)
        numbers = torch.from_numpy(_unpack(packed.contiguous().view(torch.uint8).numpy(), self.bits))
        scales, biases = (_rows(part, start, stop).float().unsqueeze(2) for part in (self.scales, self.biases))
        groups = numbers.reshape(len(packed), scales.shape[1], -1)
        return (groups * scales + biases).reshape(len(packed), -1)

    def chunks(self) -> Iterator[Tensor]:
        step = max(1, CHUNK // max(self.columns, 1))
        for start in range(0, self.row_count, step):
            yield self.rows(start, min(start + step, self.row_count))


def _rows(part: StoredTensor, start: int, stop: int) -> Tensor:
    """Return rows of the last axis, even if it is as short as the last axis of a convolution's kernel."""
    columns = part.shape[-1]
    each = part.columns // columns
    first = start // each
    found = part.rows(first, -(-stop // each)).reshape(-1, columns)
    return found[start - first * each : stop - first * each]


def _unpack(data: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Return the integers that are packed in rows of bytes, as float32, [rows, n]."""
    import numpy as np

    each = np.unpackbits(data, axis=1, bitorder="little").reshape(len(data), -1, bits)
    weights = (2 ** np.arange(bits)).astype(np.float32)
    unpacked: np.ndarray[Any, Any] = each.astype(np.float32) @ weights
    return unpacked


def is_mlx(checkpoint: Checkpoint) -> bool:
    """Return whether MLX wrote these files, by their metadata or settings."""
    if checkpoint.format != "safetensors":
        return False
    quantization = checkpoint.config.get("quantization")
    if isinstance(quantization, Mapping) and "group_size" in quantization:
        return True
    with open_safetensors(checkpoint.tensors[0].file) as file:
        return (file.metadata() or {}).get("format") == "mlx"


def unpacked(tensors: list[StoredTensor], config: Mapping[str, Any]) -> list[StoredTensor]:
    """Return the tensors, with one quantized matrix instead of its three parts."""
    named = {each.name: each for each in tensors}
    merged: dict[str, StoredTensor] = {}
    for name, tensor in named.items():
        stem = name.removesuffix(".weight")
        parts = [named.get(f"{stem}.{part}") for part in ("scales", "biases")]
        if stem != name and tensor.dtype == "U32" and parts[0] is not None and parts[1] is not None:
            found = _merge(tensor, parts[0], parts[1], _group_size(config, stem))
            if found is not None:
                merged[name] = found
    owned = {f"{name.removesuffix('.weight')}.{part}" for name in merged for part in ("scales", "biases")}
    return [merged.get(name, tensor) for name, tensor in named.items() if name not in owned]


def _merge(packed: StoredTensor, scales: StoredTensor, biases: StoredTensor, group: int) -> MLXTensor | None:
    """Return the matrix that consists of these three tensors, or None if their shapes do not fit together."""
    matching = packed.shape[:-1] == scales.shape[:-1] and scales.shape == biases.shape and len(packed.shape) > 1
    columns = scales.shape[-1] * group if scales.shape else 0
    bits, left = divmod(packed.shape[-1] * _WORD, columns) if columns else (0, 0)
    if not matching or left or bits not in _WIDTHS or not (scales.measurable and biases.measurable):
        return None
    size = packed.nbytes + scales.nbytes + biases.nbytes
    shape = (*packed.shape[:-1], columns)
    return MLXTensor(packed.name, shape, f"MLX{bits}", size, packed.file, packed, scales, biases, bits)


def _group_size(config: Mapping[str, Any], stem: str) -> int:
    quantization = config.get("quantization")
    if not isinstance(quantization, Mapping):
        return _GROUP
    own = quantization.get(stem)
    size = (own if isinstance(own, Mapping) else quantization).get("group_size", _GROUP)
    return size if isinstance(size, int) and 0 < size <= 2**16 else _GROUP
