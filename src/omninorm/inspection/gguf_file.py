"""GGUF files, llama.cpp's format: quantized tensors are dequantized a few rows at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omninorm.errors import MissingExtraError, RunError
from omninorm.inspection.tensors import CHUNK, StoredTensor

MAGIC = b"GGUF"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
# Under names of transformers' config.json, so that one reader serves both; {} is the architecture.
_SETTINGS = {
    "rms_norm_eps": "{}.attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "{}.attention.layer_norm_epsilon",
    "num_hidden_layers": "{}.block_count",
    "hidden_size": "{}.embedding_length",
}


@dataclass(frozen=True)
class GGUFTensor(StoredTensor):
    """In a GGUF file; `data` is the mapped file, [rows, bytes of a row] where it is quantized."""

    data: Any = field(repr=False, compare=False)
    quantization: Any = field(repr=False, compare=False)

    @property
    def measurable(self) -> bool:
        return _dequantizes(self.quantization)

    def chunks(self) -> Iterator[Tensor]:
        # A vector's pieces must end where a block of a quantization does; 1-D tensors are hardly ever quantized.
        rows = self.data.reshape(-1, self.data.shape[-1]) if self.numel else self.data[:0].reshape(0, 1)
        step = max(1, CHUNK // max(self.shape[-1], 1))
        for start in range(0, len(rows), step):
            yield self._dequantized(rows[start : start + step])

    def _dequantized(self, rows: Any) -> Tensor:
        import gguf
        import numpy as np

        values = rows if self.dtype == "F64" else gguf.dequantize(np.ascontiguousarray(rows), self.quantization)
        # A copy: torch must not be given the read-only mapping of the file.
        return torch.from_numpy(np.array(values)).reshape(len(rows), -1)


@functools.cache
def _dequantizes(quantization: Any) -> bool:
    """Whether the installed gguf reads this type as floating-point numbers; tried on one block of zero bytes."""
    import gguf
    import numpy as np

    if quantization.name == "F64":
        return True
    try:
        gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[quantization][1], np.uint8), quantization)
    except NotImplementedError:
        return False
    return True


def read_gguf(path: Path) -> tuple[list[StoredTensor], dict[str, Any]]:
    """The tensors of a GGUF file, or of the set of files it is split into, and its settings; no values are read.

    Raises:
        RunError: a file is missing or damaged.
        MissingExtraError: the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        remedy = "install it by `pip install 'omninorm[interop]'`"
        raise MissingExtraError("reading GGUF needs the package gguf", "an environment without it", remedy) from error
    tensors: list[StoredTensor] = []
    settings: dict[str, Any] = {}
    for part in _parts(path):
        reader = _open(part, GGUFReader)
        tensors += [_describe(part, each) for each in reader.tensors]
        settings = settings or _settings(reader)
    return tensors, settings


def _parts(path: Path) -> list[Path]:
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    parts = [path.with_name(f"{found[1]}-{number:05d}-of-{found[3]}.gguf") for number in range(1, int(found[3]) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        remedy = "download the missing parts into the same folder"
        raise RunError(f"{path.name} is one of {len(parts)} parts, all needed", f"no {missing[0]}", remedy)
    return parts


def _open(path: Path, reader: Any) -> Any:
    try:
        if path.stat().st_size < 24:  # magic, version and two counts
            raise ValueError("fewer bytes than its header has")
        return reader(path)
    # What gguf raises for a damaged file is whatever its parsing stumbles over.
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        received = f"{type(error).__name__}: {error}"
        raise RunError(f"{path} must be a whole GGUF file", received[:200], "download it again") from error


def _describe(path: Path, tensor: Any) -> GGUFTensor:
    # GGUF counts axes from the innermost one.
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    kind = tensor.tensor_type
    return GGUFTensor(str(tensor.name), shape, kind.name, int(tensor.n_bytes), path, tensor.data, kind)


def _settings(reader: Any) -> dict[str, Any]:
    fields = reader.fields
    name = fields["general.architecture"].contents() if "general.architecture" in fields else ""
    keys = {ours: theirs.format(name) for ours, theirs in _SETTINGS.items()}
    return {"model_type": name, **{ours: fields[key].contents() for ours, key in keys.items() if key in fields}}
