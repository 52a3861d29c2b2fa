"""A Hugging Face folder, read tensor by tensor: never more of it in memory than what is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from omninorm.errors import ConfigError, RunError
from omninorm.surgery.weight_files import PICKLED, PickledFile, SafetensorsFile, Stored, WeightFile

CONFIG_FILE, INDEX_FILE, SINGLE_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
_PICKLED_INDEX, _PICKLED_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


_PIECE = 2**20  # numbers
_OPEN_FOR = 2**23  # numbers that are read of an open file


class Checkpoint:
    """The weights of a folder, by name.

    Args:
        folder: with config.json and one or more safetensors, or files of torch.save with nothing but tensors.

    `files` has its files under the names that they have, or would have, as safetensors.

    Raises:
        RunError: it is no such folder, a file is missing or damaged, or reaches out of the folder.
        MissingExtraError: safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        _check_folder(folder)
        self.folder = folder
        self.config = read_json(folder / CONFIG_FILE)
        self.files: dict[str, dict[str, Stored]] = {}
        self._file_of: dict[str, str] = {}
        self.index, self._sources = _weights(folder)
        for name, file in self._sources.items():
            self.files[name] = file.entries()
            for tensor in self.files[name]:
                if tensor in self._file_of:
                    both = f"{tensor} in {self._file_of[tensor]} and {name}"
                    raise RunError("a tensor must stand once", both, "remove one")
                self._file_of[tensor] = name

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """All tensors, in the order of the files."""
        return list(self._file_of)

    def stored(self, name: str) -> Stored:
        """Dtype and shape."""
        return self.files[self._file_of[name]][name]

    def tensor(self, name: str) -> Tensor:
        """A view of the file, whose pages are let go with it."""
        return self._sources[self._file_of[name]].tensor(name)

    def rows(self, name: str, numbers: int) -> Iterator[tuple[slice, Tensor]]:
        """A tensor some rows at a time, at most so many numbers or else one row; a vector is a column of them.

        Its file is opened anew now and then: what has been read stays in memory for as long as it is open.
        """
        shape = self.stored(name).shape
        step = max(1, numbers // max(1, prod(shape[1:])))
        each = max(1, _OPEN_FOR // numbers)
        for count, start in enumerate(range(0, shape[0], step)):
            if count % each == 0:
                stored = self.tensor(name)
            part = slice(start, min(start + step, shape[0]))
            yield part, stored[part]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """All of a tensor, some megabytes at a time."""
        if not self.stored(name).shape:
            yield self.tensor(name).reshape(1)
            return
        for _, rows in self.rows(name, _PIECE):
            yield rows


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        RunError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} must be JSON", str(error), "download it again") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} must be a JSON object", type(found).__name__, "download it again")
    return found


def others(folder: Path) -> list[Path]:
    """Tokenizers and the like: files that are neither weights nor their index."""
    weights = (".safetensors", *PICKLED)
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return [path for path in files if path.suffix not in weights and not path.name.endswith(".index.json")]


def _check_folder(folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise RunError("a model's folder must hold config.json", str(folder), "name a Hugging Face folder")
    inside = folder.resolve()
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(inside):
            raise RunError("a model's files must lie in its folder", f"the link {path}", "copy the file")


def _weights(folder: Path) -> tuple[dict[str, Any] | None, dict[str, WeightFile]]:
    """The index, where there is one, and the files, by their names as safetensors."""
    for kind, single, index in (
        (SafetensorsFile, SINGLE_FILE, INDEX_FILE),
        (PickledFile, _PICKLED_SINGLE, _PICKLED_INDEX),
    ):
        if (folder / index).is_file():
            found = read_json(folder / index)
            return found, {_as_safetensors(name): kind(folder / name) for name in _shards(folder, found)}
        if (folder / single).is_file():
            return None, {SINGLE_FILE: kind(folder / single)}
    pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED), None)
    received = f"only {pickled}, which is pickled" if pickled else f"none in {folder}"
    raise RunError("weights must be safetensors", received, "save the model as safetensors first")


def _shards(folder: Path, index: dict[str, Any]) -> list[str]:
    weights = index.get("weight_map")
    names = sorted({str(name) for name in weights.values()}) if isinstance(weights, dict) else []
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name in names or ["none"]:
        if name not in there:
            raise RunError("every shard must lie in the folder", f"no {name[:200]!r}", "download it again")
    return names


def _as_safetensors(name: str) -> str:
    """pytorch_model-00001-of-00002.bin → model-00001-of-00002.safetensors."""
    path = Path(name)
    return name if path.suffix == ".safetensors" else f"{path.stem.removeprefix('pytorch_')}.safetensors"


def check_plain(config: dict[str, Any]) -> str:
    """The class that config.json names, of a model without code of its own and not quantized.

    Raises:
        ConfigError: it is another kind of model.
    """
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "none"
    if config.get("auto_map"):
        remedy = "use a model that transformers itself has; code that comes with a model is not run"
        raise ConfigError("config.json must name one of transformers' classes", f"{name}, with code of its own", remedy)
    if config.get("quantization_config"):
        raise ConfigError("weights must be floating-point", "quantized ones", "dequantize the model first")
    return name
