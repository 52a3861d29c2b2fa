"""Checkpoints: everything that the next step depends on, so that a resumed run is bit-identical.

A checkpoint is the folder checkpoints/step-N/:


model.safetensors      parameters and buffers, whole
optimizer.safetensors  AdamW's moments and step counters by parameter name, torch's random state, and with float16 the
                       state of the loss's scaler
state.json             format, step, and size and SHA-256 of the other files; nothing is unpickled

If a model is sharded over processes (FSDP2), they write format 2, which has a folder optimizer/ instead of
optimizer.safetensors, with one file per process in the layout of torch.distributed.checkpoint. Any number of processes
can read both formats, on any device.
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
from omninorm.monitor.tensors import whole
from omninorm.record.files import (
    TEMPORARY,
    remove_folder,
    rename_folder,
    sync_folder,
    write_durably,
    write_folder,
    writing,
)
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.sizes import count_layers, matrix_shapes

FORMAT, SHARDED_FORMAT = 1, 2
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_PARTS = "optimizer"
_RANDOM_STATE = "random_state"
_SCALER = {"scale": ("loss_scale", torch.float64), "_growth_tracker": ("loss_scale_steps", torch.int64)}
_FOREIGN = "use the checkpoint with the config.json that it was trained with"
_ALONE = Processes()


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    processes: Processes = _ALONE,
    scaler: torch.amp.GradScaler | None = None,
) -> Path:
    """Write `folder`/step-N, then delete all but the newest `keep` checkpoints. All processes must call this.

    Raises:
        RunError: the disk is full or not writable. No incomplete file is left, and earlier checkpoints are intact.
    """
    path = folder / f"step-{step}"
    weights, moments = _model_tensors(model), _optimizer_tensors(model, optimizer, scaler)
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
    """Write the moments of each process. The first process also writes the weights, gathered tensor by tensor."""
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
            gathered[name] = value.cpu()
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
    """Return the steps of the checkpoints in a folder, oldest first."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    # Names such as step-02 are skipped: `save_checkpoint` does not write them, and the step would give another path.
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def is_whole(folder: Path, step: int) -> bool:
    """Return whether `folder`/step-N can be read and is unchanged."""
    try:
        _read_checked(folder / f"step-{step}")
    except RunError:
        return False
    return True


def check_packages() -> None:
    """Raise MissingExtraError unless checkpoints can be written and read here."""
    _safetensors()


def load_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Restore the model and, if given, the optimizer with torch's random state, and the loss scaler.

    Everything is checked before any weight changes. The tensors keep their devices.

    Raises:
        RunError: a file is missing or damaged, or belongs to another model or format. The message names the file and,
            if there is one, the newest undamaged checkpoint from which the run can continue.
    """
    path = folder / f"step-{step}"
    try:
        content = _read_checked(path)
    except RunError as error:
        raise _with_remedy(error, folder, step) from error
    weights = _model_tensors(model)
    _check_match(path / _MODEL, weights, content.weights)
    moments: dict[str, Tensor] = {}
    if optimizer is not None:
        _create_state(model, optimizer, content.moments)
        moments = _optimizer_tensors(model, optimizer, scaler)
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
    if scaler is not None and scaler.is_enabled():
        restored = {key: moments[name].item() for key, (name, _) in _SCALER.items()}
        scaler.load_state_dict({**scaler.state_dict(), **restored})


def check_sizes(folder: Path, step: int, config: ThinkerConfig) -> None:
    """Check, before a model is built, that the tensors of `folder`/step-N have its sizes.

    Raises:
        RunError: the file with the weights can't be read, or belongs to another model.
    """
    path = folder / f"step-{step}" / _MODEL
    try:
        with _safetensors().safe_open(path, framework="pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except OSError as error:
        raise _with_remedy(_unreadable(path, error), folder, step) from error
    except Exception as error:  # safetensors raises its own exceptions
        raise _with_remedy(_damaged(f"{path} must be a safetensors file", error), folder, step) from error
    if config.n_layers != count_layers(shapes, "blocks."):
        received = f"{count_layers(shapes, 'blocks.')} layers"
        raise RunError(f"{path} must have the {config.n_layers} layers of this model", received, _FOREIGN)
    for name, shape in matrix_shapes(config).items():
        if shapes.get(name) != shape:
            received = "none" if name not in shapes else f"the shape {shapes[name]}"
            raise RunError(f"{name!r} in {path} must have the shape {shape} for this model", received, _FOREIGN)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; tied parameters appear once, under their first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {_RANDOM_STATE: torch.get_rng_state()}
    if scaler is not None and scaler.is_enabled():
        state = scaler.state_dict()
        tensors |= {name: torch.tensor(state[key], dtype=dtype) for key, (name, dtype) in _SCALER.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value
    return tensors


def _create_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Create empty AdamW state, as its first step would, for the parameters that have state in the checkpoint."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f"{name}.step" in saved:
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


def _serialize(tensors: Mapping[str, Tensor]) -> bytes:
    content: bytes = _safetensors().save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return content


@dataclass(frozen=True)
class _Content:
    """The content of a complete checkpoint.

    In format 2 the moments stay in the folder of their parts; the tensors here then have no content.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    parts: Path | None = None


def _read_checked(path: Path) -> _Content:
    """Return the content of a checkpoint after checking sizes, digests and format."""
    version, files = _read_state(path / _STATE)
    if version == FORMAT:
        whole_files = {name: _parse(path / name, _read_as(path / name, files[name])) for name in files}
        return _Content(whole_files[_MODEL], whole_files[_OPTIMIZER])
    weights = _parse(path / _MODEL, _read_as(path / _MODEL, files[_MODEL]))
    for name in files.keys() - {_MODEL}:
        _check_as(path / name, _describe_file(path / name), files[name])
    try:
        moments = describe_parts(path / _PARTS)
    except Exception as error:  # safetensors raises its own exceptions
        raise _damaged(f"{path / _PARTS} must hold safetensors files", error) from error
    return _Content(weights, moments, path / _PARTS)


def _read_as(path: Path, expected: Mapping[str, Any]) -> bytes:
    content = _read(path)
    _check_as(path, _describe(content), expected)
    return content


def _check_as(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if found["bytes"] != expected["bytes"]:
        received = f"{found['bytes']} bytes"
        raise _damaged(f"{path} must have the {expected['bytes']!r:.40} bytes that were written", received)
    if found != expected:
        raise _damaged(f"{path} has changed since it was written")


def _parse(path: Path, content: bytes) -> dict[str, Tensor]:
    library = _safetensors()
    try:
        tensors: dict[str, Tensor] = library.load(content)
    except Exception as error:  # an exception of safetensors, or of torch for impossible sizes
        raise _damaged(f"{path} must be a safetensors file", error) from error
    return tensors


def _read_state(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the format of a checkpoint and the files that it consists of."""
    try:
        state = json.loads(_read(path))
        version, files = state["format"], state["files"]
        named = {name: {"bytes": each["bytes"], "sha256": each["sha256"]} for name, each in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"{path} must describe a checkpoint", type(error).__name__) from error
    if isinstance(version, bool) or version not in (FORMAT, SHARDED_FORMAT):
        raise _damaged(f"{path} must have format {FORMAT} or {SHARDED_FORMAT}", f"format {version!r:.60}")
    others = named.keys() - {_MODEL}
    expected = others == {_OPTIMIZER} if version == FORMAT else others and all(map(_is_part, others))
    if _MODEL not in named or not expected:
        raise _damaged(f"{path} must name the files of the model and the optimizer", f"{sorted(files)!s:.200}")
    return version, named


def _is_part(name: str) -> bool:
    folder, _, file = name.partition("/")
    return folder == _PARTS and file.endswith(".safetensors") and "/" not in file


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _damaged(problem: str, received: object = "") -> RunError:
    """Return an error without a remedy; `load_checkpoint` adds it, because it knows the run's other checkpoints."""
    return RunError(f"A checkpoint is damaged: {problem}", f"{received!s:.300}", "")


def _unreadable(path: Path, error: OSError) -> RunError:
    reason = "it is missing" if isinstance(error, FileNotFoundError) else error.strerror
    return _damaged(f"{path} can't be read ({reason})")


def _check_match(path: Path, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    remedy = _FOREIGN
    if ours.keys() != theirs.keys():
        lacking, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        received = " and ".join(
            [f"no {name!r:.100}" for name in lacking[:1]] + [f"an unknown {name!r:.100}" for name in extra[:1]]
        )
        raise RunError(f"{path} must have the tensors of this model", received, remedy)
    for name, tensor in ours.items():
        other = theirs[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            wanted, found = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (tensor, other))
            raise RunError(f"{name!r} in {path} must be {wanted} for this model", found, remedy)


def _with_remedy(error: RunError, folder: Path, step: int) -> RunError:
    return RunError(error.invariant, error.received, _remedy(folder, step))


def _remedy(folder: Path, step: int) -> str:
    """Return the remedy for a damaged checkpoint. It names an older one that is whole; none is used silently."""
    for older in reversed([found for found in list_checkpoints(folder) if found < step]):
        if is_whole(folder, older):
            return f"delete {folder / f'step-{step}'} to go back to step-{older}, which is whole"
    return f"restore {folder / f'step-{step}'}, or delete it to start from the first step"


def _describe(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _describe_file(path: Path) -> dict[str, Any]:
    """Return the same as `_describe`, for a file that may not fit in memory."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise _unreadable(path, error) from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def _safetensors() -> Any:
    try:
        importlib.import_module("numpy")  # safetensors.torch itself imports it only when it writes
        import safetensors.torch
    except ImportError as error:
        name = (error.name or "safetensors").partition(".")[0]
        remedy = 'install it with pip install "omninorm[train]"'
        raise MissingExtraError(f"Checkpoints need the package {name}", "", remedy) from error
    return safetensors.torch
