"""Opens a checkpoint by its path: a file, a Hugging Face folder, a run's folder, GGUF. Pickles are refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omninorm.errors import RunError
from omninorm.inspection.gguf_file import MAGIC, read_gguf
from omninorm.inspection.tensors import Checkpoint, SafetensorsTensor, StoredTensor, read_safetensors

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# The first bytes of a zip file (torch.save) and of the pickle protocols 2 to 5.
_PICKLE_MAGIC = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", re.DOTALL)
_AGAIN = "download it again"
_READABLE = "pass a .safetensors or .gguf file, a folder with weights, or a run's folder"
_LARGEST_JSON = 2**26  # bytes; the index of a model with 10⁵ tensors takes 10 MB


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint at `path`. Only headers are read.

    Args:
        path: a .safetensors or .gguf file, an index of shards, a folder with weights, a run of `omninorm train`
            (its newest checkpoint) or one of its checkpoints.

    Raises:
        RunError: the path has no weights, or only a pickle, or a file is missing, truncated or damaged.
        MissingExtraError: the package that reads the format is not installed.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path's methods, these return False for a loop of links or an overlong name
        checkpoint = _folder(path)
    elif os.path.isfile(path):
        checkpoint = _file(path)
    else:
        problem = (
            f"{path} is neither a file nor a folder" if os.path.lexists(path) else f"No such file or folder: {path}"
        )
        raise RunError(problem, "", _READABLE)
    if not checkpoint.tensors:
        raise RunError(f"{path} does not hold a single tensor", "", "save the checkpoint again")
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
    found = f"only {', '.join(names[:3])}" + (" …" if len(names) > 3 else "") if names else "an empty folder"
    raise RunError(f"{path} must hold weights as .safetensors or .gguf", found, "pass the folder that holds them")


def _newest(run: Path) -> Path:
    """Return the newest checkpoint of a run of `omninorm train`."""
    names = [each.name.removeprefix("step-") for each in (run / "checkpoints").glob("step-*") if each.is_dir()]
    steps = [int(name) for name in names if name.isdecimal()]
    if not steps:
        raise RunError(f"The run {run} has no checkpoint yet", "", "resume it, or train it for longer")
    return run / "checkpoints" / f"step-{max(steps)}"


def _only(path: Path, names: list[str]) -> str:
    """Return the only model among GGUF files, or the first file of a model that is split."""
    models = {re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", name): name for name in reversed(names)}
    if len(models) > 1:
        received = f"{len(models)} ({', '.join(sorted(models)[:3])}{' …' if len(models) > 3 else ''})"
        raise RunError(f"{path} must hold one GGUF model", received, "pass one of the files instead")
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
    try:
        return _safetensors(path.parent, [path.name])
    except RunError as error:
        if path.suffix == ".safetensors":
            raise
        raise RunError(f"{path} is neither a safetensors nor a GGUF file", "", _READABLE) from error


def _pickle(path: Path) -> RunError:
    problem = f"{path} is a pickle, and inspecting never unpickles, because that can run arbitrary code"
    return RunError(problem, "", "if you trust the file, load it and save it with safetensors.torch.save_file")


def _gguf(path: Path) -> Checkpoint:
    tensors, config = read_gguf(path)
    return Checkpoint(path, "gguf", tensors, config)


def _indexed(index: Path) -> Checkpoint:
    weight_map = _read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, Mapping) else []
    if not files or not all(isinstance(name, str) and _is_plain(name) for name in files):
        invariant = f"The weight_map of {index} must map tensors to files in the same folder"
        raise RunError(invariant, f"{weight_map!r:.120}", _AGAIN)
    checkpoint = _safetensors(index.parent, sorted(set(files)))
    found = {tensor.name: tensor.file.name for tensor in checkpoint.tensors}
    assert isinstance(weight_map, Mapping)
    lost = [name for name, file in weight_map.items() if found.get(name) != file]
    if lost:
        named = "1 tensor" if len(lost) == 1 else f"{len(lost)} tensors"
        raise RunError(f"{index} lists {named} that its file does not hold, such as {lost[0]!r:.80}", "", _AGAIN)
    extra = [name for name in found if name not in weight_map]
    if extra:
        few = ", ".join(f"{name:.80}" for name in extra[:3]) + (" …" if len(extra) > 3 else "")
        checkpoint.notices.append(f"{index.name} does not list {len(extra)} of the tensors in its files: {few}")
    return checkpoint


def _is_plain(name: str) -> bool:
    """Return whether this is the name of a file in the same folder; an index must not refer to other folders."""
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name and "\\" not in name


def _safetensors(folder: Path, names: list[str]) -> Checkpoint:
    tensors: dict[str, SafetensorsTensor] = {}
    for name in _with_siblings(folder, names):
        for tensor in read_safetensors(folder / name):
            if tensor.name in tensors:
                both = f"{tensors[tensor.name].file.name} and {name}"
                remedy = "pass one of the files, or move the one that does not belong there"
                raise RunError(f"The tensor {tensor.name!r:.80} appears in both {both} in {folder}", "", remedy)
            tensors[tensor.name] = tensor
    config, notices = _config(folder)
    ordered: list[StoredTensor] = sorted(tensors.values(), key=lambda tensor: _natural(tensor.name))
    return Checkpoint(folder, "safetensors", ordered, config, notices)


def _with_siblings(folder: Path, names: list[str]) -> list[str]:
    """Return `names`, after checking that each file exists and that the numbers of the shards have no gap."""
    needed = set(names)
    if len(names) > 1:
        for found in filter(None, map(_SHARD.fullmatch, names)):
            count = min(int(found[3]), 10_000)
            needed |= {f"{found[1]}-{number:05d}-of-{found[3]}.safetensors" for number in range(1, count + 1)}
    missing = sorted(name for name in needed if not os.path.isfile(folder / name))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RunError(f"{folder} lacks the weights {missing[0]:.80}{more}", "", "download what is missing")
    return sorted(needed)


def _config(folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Return config.json, from next to the weights or from their run, and notices, also of a damaged config.json."""
    owner = Path(os.path.realpath(folder)).parent
    places = [folder, *([owner.parent] if owner.name == "checkpoints" else [])]
    path = next((place / _CONFIG for place in places if (place / _CONFIG).is_file()), None)
    if path is None:
        return {}, []
    try:
        return _read_json(path), []
    except RunError as error:
        return {}, [f"{_CONFIG} could not be read and was ignored ({error.received})"]


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise RunError(f"{path} must be JSON of at most 64 MB", f"{path.stat().st_size} bytes", _AGAIN)
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} must be JSON", f"{error!s:.200}", _AGAIN) from error
    if not isinstance(values, Mapping):
        raise RunError(f"{path} must be a JSON object", f"a {type(values).__name__}", _AGAIN)
    return values


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layers.10 after layers.9."""
    pieces = re.split(r"(\d+)", name)
    return [(int(piece[:18]) if piece.isdecimal() and piece.isascii() else -1, piece) for piece in pieces]
