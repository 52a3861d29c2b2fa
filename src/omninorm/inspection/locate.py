"""From a path to a checkpoint: a file, a Hugging Face folder, a run's folder, GGUF. Pickles are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omninorm.errors import RunError
from omninorm.inspection.gguf_file import MAGIC, read_gguf
from omninorm.inspection.tensors import Checkpoint, SafetensorsTensor, StoredTensor, read_safetensors

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# A zip (torch.save), and the pickle protocols 2 to 5.
_PICKLE_MAGIC = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", re.DOTALL)
_AGAIN = "download it again"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`; only headers are read.

    Args:
        path: a .safetensors or .gguf file, an index of shards, a folder with weights, a run of `omninorm train`
            (its newest checkpoint) or one of its checkpoints.

    Raises:
        RunError: nothing there, a pickle, or a file that is missing, cut off or damaged.
        MissingExtraError: the package that reads the format is not installed.
    """
    path = Path(path)
    if path.is_dir():
        checkpoint = _folder(path)
    elif path.is_file():
        checkpoint = _file(path)
    else:
        received = "one that is neither" if path.exists() else "no such file or folder"
        remedy = "pass a .safetensors or .gguf file, a folder with weights, or a run's folder"
        raise RunError(f"{path} must be a file or a folder", received, remedy)
    if not checkpoint.tensors:
        raise RunError(f"{path} must hold weights", "a checkpoint without a single tensor", "save it again")
    checkpoint.path = path
    return checkpoint


def _folder(path: Path) -> Checkpoint:
    if (path / "checkpoints").is_dir():
        return _folder(_newest(path))
    names = sorted(each.name for each in path.iterdir())
    indices = [name for name in names if name.endswith(_INDEX)]
    whole = [name for name in names if name.endswith(".safetensors")]
    gguf = [name for name in names if name.endswith(".gguf")]
    if _WEIGHTS in whole:
        return _safetensors(path, [_WEIGHTS])
    if indices:
        return _indexed(path / indices[0])
    if whole:
        return _safetensors(path, whole)
    if gguf:
        return _gguf(path / _only(path, gguf))
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise _pickle(path / pickles[0])
    received = "an empty folder" if not names else f"only {', '.join(names[:3])}" + (" …" if len(names) > 3 else "")
    raise RunError(f"{path} must hold weights as .safetensors or .gguf", received, "pass the folder they lie in")


def _newest(run: Path) -> Path:
    """The newest checkpoint of a run of `omninorm train`."""
    names = [each.name.removeprefix("step-") for each in (run / "checkpoints").glob("step-*") if each.is_dir()]
    steps = [int(name) for name in names if name.isdecimal()]
    if not steps:
        raise RunError(f"{run} must have a checkpoint", "a run without one", "train it for longer, or resume it")
    return run / "checkpoints" / f"step-{max(steps)}"


def _only(path: Path, names: list[str]) -> str:
    """The one model among GGUF files; the first part of one that is split."""
    models = {re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", name): name for name in reversed(names)}
    if len(models) > 1:
        remedy = "name one of them"
        raise RunError(f"{path} must hold one model", f"{len(models)}: {', '.join(sorted(models)[:3])}", remedy)
    return next(iter(models.values()))


def _file(path: Path) -> Checkpoint:
    if path.name.endswith(_INDEX):
        return _indexed(path)
    with open(path, "rb") as file:
        start = file.read(4)
    if start == MAGIC or path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix in _PICKLES or start.startswith(_PICKLE_MAGIC):
        raise _pickle(path)
    return _safetensors(path.parent, [path.name])


def _pickle(path: Path) -> RunError:
    remedy = "convert it where you trust it: load it there and save it by safetensors.torch.save_file"
    return RunError("a checkpoint is never unpickled, since that could run any code", str(path), remedy)


def _gguf(path: Path) -> Checkpoint:
    tensors, config = read_gguf(path)
    return Checkpoint(path, "gguf", tensors, config)


def _indexed(index: Path) -> Checkpoint:
    weight_map = _read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, Mapping) else []
    if not files or not all(isinstance(name, str) and _is_plain(name) for name in files):
        invariant = f"{index} must have a weight_map from tensors to files beside it"
        raise RunError(invariant, repr(weight_map)[:120], _AGAIN)
    checkpoint = _safetensors(index.parent, sorted(set(files)))
    found = {tensor.name: tensor.file.name for tensor in checkpoint.tensors}
    assert isinstance(weight_map, Mapping)
    lost = [name for name, file in weight_map.items() if found.get(name) != file]
    if lost:
        received = f"{len(lost)} that are not, {lost[0]!r} first"
        raise RunError(f"every tensor that {index.name} names must be in its file", received, _AGAIN)
    extra = [name for name in found if name not in weight_map]
    if extra:
        checkpoint.notices.append(f"{len(extra)} tensors are in the files but not in {index.name}, {extra[0]} first")
    return checkpoint


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder; an index must not lead anywhere else."""
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name and "\\" not in name


def _safetensors(folder: Path, names: list[str]) -> Checkpoint:
    tensors: dict[str, SafetensorsTensor] = {}
    for name in _with_siblings(folder, names):
        for tensor in read_safetensors(folder / name):
            if tensor.name in tensors:
                received = f"{tensor.name!r} in {tensors[tensor.name].file.name} and in {name}"
                remedy = "name one of the files, or move what does not belong there"
                raise RunError(f"the files in {folder} must hold one model", received, remedy)
            tensors[tensor.name] = tensor
    config, notices = _config(folder)
    ordered: list[StoredTensor] = sorted(tensors.values(), key=lambda tensor: _natural(tensor.name))
    return Checkpoint(folder, "safetensors", ordered, config, notices)


def _with_siblings(folder: Path, names: list[str]) -> list[str]:
    """`names`, after a check that each is there, and that no shard is missing where an index does not tell."""
    needed = set(names)
    if len(names) > 1:
        for found in filter(None, map(_SHARD.fullmatch, names)):
            count = min(int(found[3]), 10_000)
            needed |= {f"{found[1]}-{number:05d}-of-{found[3]}.safetensors" for number in range(1, count + 1)}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing:
        received = f"no {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise RunError(f"{folder} must hold every shard of its weights", received, "download what is missing")
    return sorted(needed)


def _config(folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    """config.json beside the weights, or of the run whose checkpoint they are; a damaged one is only a notice."""
    owner = folder.resolve().parent
    places = [folder, *([owner.parent] if owner.name == "checkpoints" else [])]
    path = next((place / _CONFIG for place in places if (place / _CONFIG).is_file()), None)
    if path is None:
        return {}, []
    try:
        return _read_json(path), []
    except RunError as error:
        return {}, [f"{_CONFIG} was left out: {error.received}"]


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} must be JSON", str(error), _AGAIN) from error
    if not isinstance(values, Mapping):
        raise RunError(f"{path} must be a JSON object", type(values).__name__, _AGAIN)
    return values


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.10 after layers.9."""
    pieces = re.split(r"(\d+)", name)
    return [(int(piece[:18]) if piece.isdecimal() and piece.isascii() else -1, piece) for piece in pieces]
