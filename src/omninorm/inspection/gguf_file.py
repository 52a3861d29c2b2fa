"""Reads GGUF files (llama.cpp's format). Quantized tensors are dequantized a few rows at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from omninorm.errors import MissingExtraError, RunError
from omninorm.inspection.gguf_header import MAGIC, Header, TensorEntry, bytes_of, read_header
from omninorm.inspection.tensors import CHUNK, StoredTensor

__all__ = ["MAGIC", "GGUFTensor", "read_gguf"]

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
# GGUF's settings and their names in transformers' config.json, so that the same code reads both. In GGUF, the name of
# the architecture precedes them.
_SETTINGS = {
    "rms_norm_eps": ".attention.layer_norm_rms_epsilon",
    "layer_norm_eps": ".attention.layer_norm_epsilon",
    "num_hidden_layers": ".block_count",
    "hidden_size": ".embedding_length",
    "num_attention_heads": ".attention.head_count",
    "num_key_value_heads": ".attention.head_count_kv",
    "head_dim": ".attention.key_length",
    "rope_theta": ".rope.freq_base",
}


# NumPy's types of tensors that are not quantized.
_PLAIN = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"}


@dataclass(frozen=True)
class GGUFTensor(StoredTensor):
    """A tensor of a GGUF file. `data` is mapped from the file; for a quantized tensor it is [rows, bytes of a row]."""

    data: Any = field(repr=False, compare=False)
    quantization: Any = field(repr=False, compare=False)

    @property
    def measurable(self) -> bool:
        return _dequantizes(self.quantization)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._dequantized(self.data.reshape(-1, self.data.shape[-1])[start:stop]).reshape(-1, self.columns)

    def chunks(self) -> Iterator[Tensor]:
        # The pieces of a vector must consist of whole quantization blocks; 1-D tensors are hardly ever quantized.
        rows = self.data.reshape(-1, self.data.shape[-1]) if self.numel else self.data[:0].reshape(0, 1)
        step = max(1, CHUNK // max(self.shape[-1], 1))
        for start in range(0, len(rows), step):
            yield self._dequantized(rows[start : start + step])

    def _dequantized(self, rows: Any) -> Tensor:
        import gguf
        import numpy as np

        with np.errstate(all="ignore"):  # a scale may be NaN or infinite, which a rule reports
            values = rows if self.dtype == "F64" else gguf.dequantize(np.ascontiguousarray(rows), self.quantization)
        # Copy the values, because torch must not get the read-only mapping of the file.
        return torch.from_numpy(np.array(values)).reshape(len(rows), -1)


@functools.cache
def _dequantizes(quantization: Any) -> bool:
    """Return whether the installed package gguf can decode this type; this decodes one block of zeros."""
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
    """Return the tensors and the settings of a GGUF file, or of all files of a model that is split.

    Only headers are read.

    Raises:
        RunError: a file is missing or damaged.
        MissingExtraError: the package gguf is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        remedy = 'install it with pip install "omninorm[interop]"'
        raise MissingExtraError("Reading GGUF needs the package gguf", "", remedy) from error
    tensors: list[StoredTensor] = []
    settings: dict[str, Any] = {}
    for part in _parts(path):
        found, here = _read_part(part)
        tensors += found
        settings = settings or _settings(here)
    return tensors, settings


def _parts(path: Path) -> list[Path]:
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    parts = [path.with_name(f"{found[1]}-{number:05d}-of-{found[3]}.gguf") for number in range(1, int(found[3]) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        remedy = "download the missing parts into the same folder"
        raise RunError(f"{path.name} is one of {len(parts)} parts, and {missing[0]} is missing", "", remedy)
    return parts


def _read_part(path: Path) -> tuple[list[GGUFTensor], Header]:
    import numpy as np

    try:
        content = np.memmap(path, mode="r")
        header = read_header(content)
        return [_describe(path, entry, content, header.order) for entry in header.tensors], header
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not a complete GGUF file: {error}", "", "download it again") from error


def _describe(path: Path, entry: TensorEntry, content: Any, order: Literal["<", ">"]) -> GGUFTensor:
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType(entry.kind)
    nbytes, rows = bytes_of(entry, *gguf.GGML_QUANT_SIZES[kind], len(content))
    data = content[entry.start : entry.start + nbytes]
    if kind.name in _PLAIN:
        data, rows = data.view(np.dtype(_PLAIN[kind.name]).newbyteorder(order)), entry.shape
    return GGUFTensor(entry.name, entry.shape, kind.name, nbytes, path, data.reshape(rows), kind)


def _settings(header: Header) -> dict[str, Any]:
    name = header.settings.get("general.architecture", "")
    keys = {ours: f"{name:.80}{theirs}" for ours, theirs in _SETTINGS.items()} if isinstance(name, str) else {}
    return {"model_type": name} | {ours: header.settings[key] for ours, key in keys.items() if key in header.settings}
