"""checkpoints/step-N/: everything that the next step depends on, so that a resumed run is bit-identical.

model.safetensors      parameters and buffers
optimizer.safetensors  AdamW's moments and step counters by parameter name, and torch's random state
state.json             format, step, and size and SHA-256 of the two files; nothing is ever unpickled
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import MissingExtraError, RunError
from omninorm.record.files import remove_folder, sync_folder, write_folder, writing

FORMAT = 1
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_RANDOM_STATE = "random_state"


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Writes `folder`/step-N and then deletes all but the newest `keep` checkpoints.

    Raises:
        RunError: the disk is full or not writable; nothing half-written is left, earlier checkpoints are intact.
    """
    files = {_MODEL: _serialize(_model_tensors(model)), _OPTIMIZER: _serialize(_optimizer_tensors(model, optimizer))}
    state = {"format": FORMAT, "step": step, "files": {name: _describe(data) for name, data in files.items()}}
    path = folder / f"step-{step}"
    with writing(path):
        if not folder.is_dir():
            folder.mkdir()
            sync_folder(folder.parent)
        write_folder(path, {**files, _STATE: json.dumps(state, indent=1).encode()})
        for old in list_checkpoints(folder)[:-keep]:
            remove_folder(folder / f"step-{old}")
    return path


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
        tensors = _read_checked(path)
    except RunError as error:
        raise RunError(error.invariant, error.received, _remedy(folder, step)) from error
    weights = _model_tensors(model)
    _check_match(path / _MODEL, weights, tensors[_MODEL])
    moments: dict[str, Tensor] = {}
    if optimizer is not None:
        _create_state(model, optimizer, tensors[_OPTIMIZER])
        moments = _optimizer_tensors(model, optimizer)
        _check_match(path / _OPTIMIZER, moments, tensors[_OPTIMIZER])
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(tensors[_MODEL][name])
        for name, tensor in moments.items():
            tensor.copy_(tensors[_OPTIMIZER][name])
    if optimizer is not None:
        torch.set_rng_state(tensors[_OPTIMIZER][_RANDOM_STATE])


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


def _read_checked(path: Path) -> dict[str, dict[str, Tensor]]:
    """Both files' tensors, after checking sizes, digests and format."""
    state = _read_state(path / _STATE)
    tensors = {}
    for name, expected in state["files"].items():
        content = _read(path / name)
        if len(content) != expected["bytes"]:
            received = f"{len(content)} bytes in {path / name}, written as {expected['bytes']}"
            raise RunError("a checkpoint must be whole", received, "")
        if _describe(content) != expected:
            raise RunError("a checkpoint must be what was written", f"other content in {path / name}", "")
        tensors[name] = _parse(path / name, content)
    return tensors


def _parse(path: Path, content: bytes) -> dict[str, Tensor]:
    library = _safetensors()
    try:
        tensors: dict[str, Tensor] = library.load(content)
    except Exception as error:  # the library's own error, and what torch says of sizes that can't be
        raise RunError("a checkpoint must be made of safetensors files", f"{error} in {path}", "") from error
    return tensors


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(_read(path))
        version, files = state["format"], state["files"]
        sizes = [(files[name]["bytes"], files[name]["sha256"]) for name in (_MODEL, _OPTIMIZER)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        received = f"{type(error).__name__} in {path}"
        raise RunError("a checkpoint must have a readable state.json", received, "") from error
    if version != FORMAT:
        raise RunError(f"a checkpoint must have format {FORMAT}", f"format {version!r} in {path}", "")
    if len(files) != len(sizes):
        raise RunError("a checkpoint must be made of two tensor files", f"{sorted(files)} in {path}", "")
    return {"files": files}


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
