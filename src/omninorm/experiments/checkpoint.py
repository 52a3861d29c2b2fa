"""checkpoints/step-N/: everything that the next step depends on, so that a resumed run is bit-identical.

model.safetensors      parameters and buffers, whole
optimizer.safetensors  AdamW's moments and step counters by parameter name, and torch's random state
state.json             format, step, and size and SHA-256 of the other files; nothing is ever unpickled

Processes that share a model (FSDP2) write format 2: in the place of optimizer.safetensors stands optimizer/ with a
file of each process, in the layout of torch.distributed.checkpoint. Any number of processes can read both formats.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import MissingExtraError, RunError
from omninorm.experiments.processes import Processes
from omninorm.experiments.sharding import copy_whole, describe_parts, load_parts, save_parts
from omninorm.record.files import (
    TEMPORARY,
    remove_folder,
    rename_folder,
    sync_folder,
    write_durably,
    write_folder,
    writing,
)
from omninorm.watch.tensors import whole

FORMAT, SHARDED_FORMAT = 1, 2
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_PARTS = "optimizer"
_RANDOM_STATE = "random_state"
_ALONE = Processes()


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    processes: Processes = _ALONE,
) -> Path:
    """Writes `folder`/step-N and then deletes all but the newest `keep` checkpoints. All processes must call it.

    Raises:
        RunError: the disk is full or not writable; nothing half-written is left, earlier checkpoints are intact.
    """
    path = folder / f"step-{step}"
    weights, moments = _model_tensors(model), _optimizer_tensors(model, optimizer)
    if processes.sharded:
        _save_sharded(path, step, weights, moments, processes)
    elif processes.first:
        _save_whole(path, step, weights, moments)
    if processes.first:
        with writing(path):
            for old in list_checkpoints(folder)[:-keep]:
                remove_folder(folder / f"step-{old}")
    return path


def _save_whole(path: Path, step: int, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    files = {_MODEL: _serialize(weights), _OPTIMIZER: _serialize(moments)}
    state = _state(FORMAT, step, {name: _describe(data) for name, data in files.items()})
    with writing(path):
        _make_parent(path)
        write_folder(path, {**files, _STATE: state})


def _save_sharded(
    path: Path, step: int, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], processes: Processes
) -> None:
    """Each process writes its moments, the first one also the weights, gathered tensor by tensor."""
    partial = path.with_name(f"{TEMPORARY}{path.name}")
    failure: OSError | None = None

    def begin() -> None:
        with writing(path):
            _make_parent(path)
            partial.mkdir()

    def finish() -> None:
        try:
            with writing(path):
                if failure is not None:
                    raise failure
                write_durably(partial / _MODEL, _serialize(gathered))
                sync_folder(partial / _PARTS)
                files = [partial / _MODEL, *sorted((partial / _PARTS).iterdir())]
                described = {file.relative_to(partial).as_posix(): _describe_file(file) for file in files}
                write_durably(partial / _STATE, _state(SHARDED_FORMAT, step, described))
                rename_folder(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    processes.from_first(begin)
    gathered = {}
    for name, tensor in weights.items():
        value = whole(tensor)
        if processes.first:
            gathered[name] = value
    try:
        save_parts(partial / _PARTS, moments)
    except OSError as error:
        failure = error
    processes.from_first(finish)


def _make_parent(path: Path) -> None:
    if not path.parent.is_dir():
        path.parent.mkdir()
        sync_folder(path.parent.parent)


def _state(version: int, step: int, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    return json.dumps({"format": version, "step": step, "files": files}, indent=1).encode()


def list_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    # A name such as step-02 is not one that `save_checkpoint` gives, nor one that it would find again.
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def is_whole(folder: Path, step: int) -> bool:
    """Whether `folder`/step-N can be read and is what was written."""
    try:
        _read_checked(folder / f"step-{step}")
    except RunError:
        return False
    return True


def check_packages() -> None:
    """Raises MissingExtraError unless checkpoints can be written and read here."""
    _safetensors()


def load_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Restores the model and, if an optimizer is given, it and torch's random state.

    Everything is checked before a weight is changed.

    Raises:
        RunError: a file is missing or damaged, or belongs to another model or format. The message names the file,
            and the newest undamaged checkpoint to continue from if there is one.
    """
    path = folder / f"step-{step}"
    try:
        content = _read_checked(path)
    except RunError as error:
        raise RunError(error.invariant, error.received, _remedy(folder, step)) from error
    weights = _model_tensors(model)
    _check_match(path / _MODEL, weights, content.weights)
    moments: dict[str, Tensor] = {}
    if optimizer is not None:
        _create_state(model, optimizer, content.moments)
        moments = _optimizer_tensors(model, optimizer)
        _check_match(content.parts or path / _OPTIMIZER, moments, content.moments)
    with torch.no_grad():
        for name, tensor in weights.items():
            copy_whole(tensor, content.weights[name])
        if content.parts is None:
            for name, tensor in moments.items():
                copy_whole(tensor, content.moments[name])
        elif moments:
            load_parts(content.parts, moments)
    if optimizer is not None:
        torch.set_rng_state(moments[_RANDOM_STATE])


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied ones only the first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {_RANDOM_STATE: torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value
    return tensors


def _create_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Gives AdamW an empty state, as its first step would, for the parameters that had one when it was saved."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f"{name}.step" in saved:
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


def _serialize(tensors: Mapping[str, Tensor]) -> bytes:
    content: bytes = _safetensors().save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return content


@dataclass(frozen=True)
class _Content:
    """A checkpoint that is whole. Where moments lie in parts, in that folder, these tensors have no content."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    parts: Path | None = None


def _read_checked(path: Path) -> _Content:
    """What is in a checkpoint, after checking sizes, digests and format."""
    version, files = _read_state(path / _STATE)
    if version == FORMAT:
        whole_files = {name: _parse(path / name, _read_as(path / name, files[name])) for name in files}
        return _Content(whole_files[_MODEL], whole_files[_OPTIMIZER])
    weights = _parse(path / _MODEL, _read_as(path / _MODEL, files[_MODEL]))
    for name in files.keys() - {_MODEL}:
        _check_as(path / name, _describe_file(path / name), files[name])
    try:
        moments = describe_parts(path / _PARTS)
    except Exception as error:  # the library's own errors
        received = f"{error} in {path / _PARTS}"
        raise RunError("a checkpoint must be made of safetensors files", received, "") from error
    return _Content(weights, moments, path / _PARTS)


def _read_as(path: Path, expected: Mapping[str, Any]) -> bytes:
    content = _read(path)
    _check_as(path, _describe(content), expected)
    return content


def _check_as(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if found["bytes"] != expected["bytes"]:
        received = f"{found['bytes']} bytes in {path}, written as {expected['bytes']}"
        raise RunError("a checkpoint must be whole", received, "")
    if found != expected:
        raise RunError("a checkpoint must be what was written", f"other content in {path}", "")


def _parse(path: Path, content: bytes) -> dict[str, Tensor]:
    library = _safetensors()
    try:
        tensors: dict[str, Tensor] = library.load(content)
    except Exception as error:  # the library's own error, and what torch says of sizes that can't be
        raise RunError("a checkpoint must be made of safetensors files", f"{error} in {path}", "") from error
    return tensors


def _read_state(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The format and the files that a checkpoint is made of."""
    try:
        state = json.loads(_read(path))
        version, files = state["format"], state["files"]
        named = {name: {"bytes": each["bytes"], "sha256": each["sha256"]} for name, each in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        received = f"{type(error).__name__} in {path}"
        raise RunError("a checkpoint must have a readable state.json", received, "") from error
    if version not in (FORMAT, SHARDED_FORMAT):
        received = f"format {version!r} in {path}"
        raise RunError(f"a checkpoint must have format {FORMAT} or {SHARDED_FORMAT}", received, "")
    others = named.keys() - {_MODEL}
    expected = others == {_OPTIMIZER} if version == FORMAT else others and all(map(_is_part, others))
    if _MODEL not in named or not expected:
        invariant = "a checkpoint must be made of the model's file and the optimizer's"
        raise RunError(invariant, f"{sorted(files)} in {path}", "")
    return version, named


def _is_part(name: str) -> bool:
    folder, _, file = name.partition("/")
    return folder == _PARTS and file.endswith(".safetensors") and "/" not in file


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError("a checkpoint must have all its files", f"{error.strerror} at {path}", "") from error


def _check_match(path: Path, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    remedy = "use the checkpoint with the config.json that it was trained with"
    if ours.keys() != theirs.keys():
        lacking, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        received = " and ".join(
            [f"no {name!r}" for name in lacking[:1]] + [f"a foreign {name!r}" for name in extra[:1]]
        )
        raise RunError("a checkpoint must have the model's tensors", f"{received} in {path}", remedy)
    for name, tensor in ours.items():
        other = theirs[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            wanted, found = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (tensor, other))
            raise RunError(f"{name!r} of this model must be {wanted}", f"{found} in {path}", remedy)


def _remedy(folder: Path, step: int) -> str:
    """What to do about a damaged checkpoint: the newest older one that is whole is named, never silently used."""
    for older in reversed([found for found in list_checkpoints(folder) if found < step]):
        if is_whole(folder, older):
            return f"delete {folder / f'step-{step}'} to go back to step-{older}, which is whole"
    return f"restore {folder / f'step-{step}'}, or delete it to start from the first step"


def _describe(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _describe_file(path: Path) -> dict[str, Any]:
    """As `_describe`, of a file that may not fit in memory."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise RunError("a checkpoint must have all its files", f"{error.strerror} at {path}", "") from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def _safetensors() -> Any:
    try:
        importlib.import_module("numpy")  # safetensors.torch itself imports it only when it writes
        import safetensors.torch
    except ImportError as error:
        name = (error.name or "safetensors").partition(".")[0]
        remedy = 'install it with pip install "omninorm[train]"'
        invariant = "checkpoints need the packages safetensors and numpy"
        raise MissingExtraError(invariant, f"an installation without {name}", remedy) from error
    return safetensors.torch
