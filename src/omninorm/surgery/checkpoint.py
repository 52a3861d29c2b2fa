"""Weights of a Hugging Face folder, read tensor by tensor: only what is used is in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from omninorm.errors import ConfigError, RunError
from omninorm.surgery.weight_files import PICKLED, PickledFile, SafetensorsFile, Stored, WeightFile

CONFIG_FILE, INDEX_FILE, SINGLE_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
_PICKLED_INDEX, _PICKLED_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


ADAPTER = "adapter_config.json"
_LARGEST_JSON = 2**26  # bytes
_PIECE = 2**20  # elements
_OPEN_FOR = 2**23  # elements that are read before a file is reopened


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
                    both = f"{self._file_of[tensor]} and {name}"
                    raise RunError(f"The tensor {tensor:.80} appears in both {both}", "", "remove one of them")
                self._file_of[tensor] = name

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the files."""
        return list(self._file_of)

    def stored(self, name: str) -> Stored:
        """Return a tensor's dtype and shape."""
        return self.files[self._file_of[name]][name]

    def tensor(self, name: str) -> Tensor:
        """Return a view of the file, whose pages are released with it."""
        return self._sources[self._file_of[name]].tensor(name)

    def rows(self, name: str, numbers: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield a tensor some rows at a time: at most `numbers` elements, or one row; a vector counts as a column.

        The file is reopened now and then, because what has been read stays in memory for as long as it is open.
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
        """Yield all of a tensor, some megabytes at a time."""
        if not self.stored(name).shape:
            yield self.tensor(name).reshape(1)
            return
        for _, rows in self.rows(name, _PIECE):
            yield rows


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        RunError: it holds something else.
    """
    again = "download it again"
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise RunError(f"{path} must be JSON of at most 64 MB", f"{path.stat().st_size} bytes", again)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} must be JSON", f"{error!s:.200}", again) from error
    if not isinstance(found, dict):
        raise RunError(f"{path} must be a JSON object", f"a {type(found).__name__}", again)
    return found


def others(folder: Path) -> list[Path]:
    """Return the files that are neither weights nor their index, such as a tokenizer's."""
    weights = (".safetensors", *PICKLED)
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return [path for path in files if path.suffix not in weights and not path.name.endswith(".index.json")]


def _check_folder(folder: Path) -> None:
    if not os.path.isdir(folder):
        raise RunError(f"No such folder: {folder}", "", "check the path")
    if not os.path.isfile(folder / CONFIG_FILE):
        if os.path.isfile(folder / ADAPTER):
            problem = f"{folder} holds only an adapter, not the model that it belongs to"
            raise RunError(problem, "", "merge it into the model first, with merge_and_unload() of PEFT")
        raise RunError(f"{folder} does not hold config.json", "", "pass the folder of a Hugging Face model")
    inside = os.path.realpath(folder)
    for link in _links(folder):
        if not os.path.exists(link):
            raise RunError(f"The link {link} leads nowhere", "", "download the file that it should lead to")
        if os.path.commonpath((inside, os.path.realpath(link))) != inside:
            remedy = "replace the link by a copy of the file"
            raise RunError(f"The link {link} leads out of the model's folder", "", remedy)


def _links(folder: Path) -> Iterator[str]:
    """Yield the symbolic links in a folder and its subfolders, however deep."""
    folders = [str(folder)]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                found = list(entries)
            for entry in found:
                if entry.is_symlink():
                    yield entry.path
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be read ({error.strerror})", "", "check its permissions and subfolders"
        ) from error


def _weights(folder: Path) -> tuple[dict[str, Any] | None, dict[str, WeightFile]]:
    """Return the index, where there is one, and the files by their names as safetensors."""
    for kind, single, index in (
        (SafetensorsFile, SINGLE_FILE, INDEX_FILE),
        (PickledFile, _PICKLED_SINGLE, _PICKLED_INDEX),
    ):
        if (folder / index).is_file():
            found = read_json(folder / index)
            return found, {_as_safetensors(name): kind(folder / name) for name in _shards(folder, found, index)}
        if (folder / single).is_file():
            return None, {SINGLE_FILE: kind(folder / single)}
    pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED), None)
    received = f"only the pickled file {pickled:.80}" if pickled else "neither of them"
    remedy = "save the model as safetensors first"
    raise RunError(f"{folder} must hold {SINGLE_FILE} or {INDEX_FILE}", received, remedy)


def _shards(folder: Path, index: dict[str, Any], name_of_index: str) -> list[str]:
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        problem = f"The weight_map of {folder / name_of_index} must map tensors to files"
        raise RunError(problem, f"{weights!r:.80}", "download it again")
    names = sorted({str(name) for name in weights.values()})
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name in names:
        if name not in there:
            raise RunError(f"{folder} lacks the weights {name!r:.80}, which its index names", "", "download them again")
    return names


def _as_safetensors(name: str) -> str:
    """pytorch_model-00001-of-00002.bin → model-00001-of-00002.safetensors."""
    path = Path(name)
    return name if path.suffix == ".safetensors" else f"{path.stem.removeprefix('pytorch_')}.safetensors"


def check_plain(config: dict[str, Any]) -> str:
    """Return the class that config.json names, of a model that is not quantized and has no code of its own.

    Raises:
        ConfigError: it is another kind of model.
    """
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if not name:
        problem = "architectures in config.json must name one of transformers' model classes"
        raise ConfigError(problem, f"{names!r:.80}", 'add it, such as ["LlamaForCausalLM"]')
    if config.get("auto_map"):
        problem = f"config.json names {name:.80}, with code that comes with the model, which convert does not run"
        raise ConfigError(problem, "", "use a model that transformers itself has")
    if config.get("quantization_config"):
        raise ConfigError(
            "The weights are quantized, as quantization_config in config.json says", "", "dequantize the model first"
        )
    return name
