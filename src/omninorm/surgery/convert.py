"""Surgery on a checkpoint: read a Hugging Face folder, write an equivalent one with its verification in surgery.json.

Neither the model nor the checkpoint is ever in memory as a whole (see streamed.py). The new folder has the old one's
files, tensors and class. So nothing is folded into a bias that the class does not have, and centered LayerNorms stay
LayerNorms.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omninorm.errors import ConfigError, RunError
from omninorm.record.files import sync_folder, write_file, writing
from omninorm.surgery.center import center_all
from omninorm.surgery.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    Checkpoint,
    others,
    read_json,
)
from omninorm.surgery.fold import fold_all
from omninorm.surgery.report import Report, Surgery
from omninorm.surgery.rotate import SPACES, check_choices, rotate_all
from omninorm.surgery.settle import Probed
from omninorm.surgery.streamed import StreamedModel, open_model
from omninorm.surgery.streamed_map import StreamedMap
from omninorm.surgery.swap import swap_norms
from omninorm.surgery.verify import with_plain_experts
from omninorm.surgery.weight_files import DTYPES, SafetensorsFile, Stored
from omninorm.surgery.writer import Writer, pieces, size

# Probes of image models.
_LARGEST_IMAGE, _MOST_CHANNELS = 2048, 64

OPERATIONS = ("swap", "fold", "center", "fold+center", "rotate")
_NOTHING = {
    "swap": "it has no norms that omninorm can replace",
    "fold": "it has no norms with a γ or β that can be folded",
    "center": "it has no LayerNorm, and only a LayerNorm subtracts a mean",
    "fold+center": "it has no norms with a γ or β that can be folded, and no LayerNorm",
    "rotate": "it has no residual stream and no heads that can be rotated",
}
PROOF_FILE, DELTA_FILE = "surgery.json", "surgery_delta.safetensors"
FORMAT = 2

Tell = Callable[[str, float], None]
"""Called with the name of the current step and the fraction of it that is done."""


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion, or of a dry run.

    Args:
        operation: "swap", "fold", "center", "fold+center" or "rotate".
        changed, refused: as in the report of the operation.
        error: the largest difference of the outputs in float64, relative to the largest output.
        rounded: the same with the weights as written, rounded to the checkpoint's dtypes; None if nothing was written.
    """

    operation: str
    changed: Mapping[str, str]
    refused: Mapping[str, str]
    error: float
    rounded: float | None


def convert(
    source: Path,
    target: Path | None,
    operation: str,
    *,
    kind: str = "hadamard",
    keep_delta: bool = True,
    tell: Tell = lambda what, share: None,
) -> Conversion:
    """Fold the gains of a checkpoint's norms, center or rotate it, and write the result as a new checkpoint.

    Needs memory for twice the largest tensor, and about 400 MB for torch and transformers themselves; "rotate" needs up
    to 100 MB more, and the largest matrix that writes to the residual stream in the file's dtype.

    Args:
        source: a folder with config.json and safetensors; it is only read.
        target: a folder that does not exist yet; None writes nothing.
        operation: "fold", "center", "fold+center" for both, "rotate", or "swap", which changes no weight: the copy's
            surgery.json lists the norms that omninorm can replace, and how far that moves the outputs.
        kind: of rotation, "hadamard" or "random".
        keep_delta: save the original values of changed weights next to the new ones, so that `undo` can restore them.
        tell: called with the progress.

    Raises:
        RunError: the source is not such a folder, or damaged; the target exists or cannot be written; nothing can be
            converted; or the result could not be verified.
        ConfigError: an unknown operation or kind; a model of another class than transformers', quantized, with code of
            its own, or with sizes that do not fit its weights.
        MissingExtraError: transformers or safetensors is not installed.
    """
    _check_operation(operation, kind)
    _check_target(target)
    checkpoint = Checkpoint(source)
    tell("verifying in float64", 0.0)
    opened = open_model(checkpoint, None if operation == "swap" else torch.float64)
    probes = _probes(opened)
    report, error, before = _operate(opened, operation, probes, kind)
    _check_changed(report, source, operation, type(opened.model).__name__)
    _check_finite(error)
    done = Conversion(operation, report.changed, report.refused, error, None)
    if target is None:
        return done
    with _new_folder(target) as folder:
        written = _write(opened, folder, keep_delta, tell)
        tell("verifying the written weights", 1.0)
        del opened
        before.forget_model()
        again = open_model(Checkpoint(folder)).model
        if operation != "swap":
            swap_norms(again)
            with_plain_experts(again)
        rounded = before.distance_to(Probed(again, probes))
        _check_finite(rounded)
        done = replace(done, rounded=rounded)
        kinds = {"rotation": kind} if operation == "rotate" else {}
        proof = {"format": FORMAT, **asdict(done), **kinds, **written, "config": checkpoint.config}
        # A config may hold Infinity, as Mamba-2's time_step_limit does.
        write_file(folder / PROOF_FILE, (json.dumps(proof, indent=1) + "\n").encode())
    return done


def undo(source: Path, target: Path, tell: Tell = lambda what, share: None) -> None:
    """Restore what `convert` changed, bit for bit, from the original values that it saved.

    Raises:
        RunError: the folder was not converted, the original values were not saved, weights have changed since, or the
            target cannot be written.
    """
    _check_target(target)
    checkpoint, proof = Checkpoint(source), _read_proof(source)
    delta = _read_delta(source, set(proof["changed_tensors"]))
    before: dict[str, str] = proof["before_sha256"]
    files = {
        file: {name: delta.get(name, stored) for name, stored in entries.items() if name not in proof["added"]}
        for file, entries in checkpoint.files.items()
    }

    def value(name: str) -> Tensor:
        return SafetensorsFile(source / DELTA_FILE).tensor(name) if name in delta else checkpoint.tensor(name)

    with _new_folder(target) as folder:
        hashes: dict[str, str] = {}
        for file, entries, told in _with_progress(files, "restoring", tell):
            with Writer(folder / file, entries) as out:
                for name in entries:
                    out.add(name, pieces(value(name)))
                    told(name)
            hashes |= out.hashes
        if hashes != before:
            wrong = next(iter(sorted(set(hashes.items()) ^ set(before.items()))))[0]
            problem = f"Cannot undo: {wrong:.80} in {source} was changed after the conversion"
            raise RunError(problem, "", "restore the converted folder, or convert the original again")
        _write_index(checkpoint, files, folder)
        write_file(folder / CONFIG_FILE, (json.dumps(proof["config"], indent=2) + "\n").encode())
        _copy_others(source, folder, without=(PROOF_FILE,))


# Verifying ---------------------------------------------------------------------------------------------------------


def _operate(opened: StreamedModel, operation: str, probes: list[Any], kind: str) -> tuple[Report, float, Probed]:
    """Run the operation; return its report, how far the outputs moved, and the outputs before it."""
    model = opened.model
    if operation == "swap":
        report: Report = (swap := swap_norms(model))  # in the checkpoint's dtypes, whose order of rounding matters
        swap.undo()
        opened.model = model = open_model(opened.checkpoint).model
        before = Probed(model, probes)
        for name in set(swap_norms(model).changed) - set(report.changed):
            report.refused.setdefault(
                name, "in the checkpoint's dtype it rounds in an order that omninorm does not have"
            )
        return report, before.distance(), before
    swap_norms(model)
    with_plain_experts(model)
    before, done = Probed(model, probes), Surgery()
    if operation == "rotate":
        rotate_all(before, None, done, kind, SPACES)
        return done, before.distance(), before
    if operation != "center":
        fold_all(before, None, done, new_biases=False)
    if operation != "fold":
        centered = Surgery()
        center_all(before, None, centered, new_biases=False, replace=False)
        kept = {name: f"not centered: {why}" for name, why in centered.refused.items() if name in done.changed}
        for name, what in (centered.changed | kept).items():
            done.changed[name] = f"{done.changed[name]}; {what}" if name in done.changed else what
        done.refused |= {name: why for name, why in centered.refused.items() if name not in kept}
        if operation != "center" and not centered.changed and not centered.refused:
            done.refused[type(model).__name__] = _NOTHING["center"]
    return done, before.distance(), before


def _probes(opened: StreamedModel) -> list[Any]:
    model = opened.model
    name, config = getattr(model, "main_input_name", "input_ids"), model.config
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids" and not getattr(config, "is_encoder_decoder", False):
        return [torch.randint(0, _count(config.get_text_config(), "vocab_size"), (2, 8), generator=generator)]
    if name == "pixel_values":
        side = _count(config, "image_size", _LARGEST_IMAGE)
        shape = (2, _count(config, "num_channels", _MOST_CHANNELS), side, side)
        return [{"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}]
    problem = f"{type(model).__name__} takes {name!s:.80}, and convert supports models of tokens or images alone"
    raise ConfigError(problem, "", "load the model, and call omninorm.surgery on it with inputs=[…]")


def _count(config: Any, name: str, most: int = 2**31) -> int:
    """Return a size from config.json that the inputs have."""
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"{name} in config.json must be an integer from 1 to {most}", f"{value!r:.80}", "correct it")
    return value


def _check_operation(operation: str, kind: str) -> None:
    """Raise ConfigError for an unknown operation or kind of rotation."""
    if operation not in OPERATIONS:
        known = ", ".join(OPERATIONS)
        raise ConfigError(f"operation must be one of {known}", f"{operation!r:.80}", "choose one of them")
    check_choices(kind, SPACES)


def _check_changed(report: Report, source: Path, operation: str, model: str) -> None:
    """Raise RunError if nothing was changed."""
    if not report.changed:
        name, why = next(iter(report.refused.items()), (model, _NOTHING[operation]))
        problem = f"Nothing to {operation} in {source}: {name:.80}: {why}"
        raise RunError(problem, "", "docs/surgery.md lists the models that can be converted")


def _check_finite(distance: float) -> None:
    """Raise RunError for outputs that came out infinitely far apart."""
    if not math.isfinite(distance):
        problem = "The converted model's outputs contain NaN or infinity, so the conversion could not be verified"
        raise RunError(problem, "", "if its weights are too large for their dtype, convert a copy in a wider one")


# Writing -----------------------------------------------------------------------------------------------------------


def _write(opened: StreamedModel, folder: Path, keep_delta: bool, tell: Tell) -> dict[str, Any]:
    """Write the new weights, index, config and other files; return their entries of surgery.json."""
    checkpoint = opened.checkpoint
    values, added = _values(opened)
    changed = {name: checkpoint.stored(name) for name in checkpoint.names() if name in values}
    files = dict(checkpoint.files)
    last = next(reversed(files))
    files[last] = files[last] | {name: checkpoint.stored(opened.stored[of]) for name, of in added.items()}
    _check_space(folder, sum(map(size, changed.values())) * keep_delta, files)
    after: dict[str, str] = {}
    with ExitStack() as stack:
        delta = stack.enter_context(Writer(folder / DELTA_FILE if keep_delta and changed else None, changed))
        for file, entries, told in _with_progress(files, "writing", tell):
            with Writer(folder / file, entries) as out:
                for name, stored in entries.items():
                    if name in changed:
                        delta.add(name, checkpoint.pieces(name))
                    whole = checkpoint.pieces(name) if name not in values else values[name](stored)
                    out.add(name, whole)
                    told(name)
            after |= out.hashes
    _write_index(checkpoint, files, folder)
    _write_config(checkpoint, folder, untied=bool(added))
    _copy_others(checkpoint.folder, folder)
    before = {name: delta.hashes.get(name, hash) for name, hash in after.items() if name not in added}
    return {
        "changed_tensors": sorted(changed),
        "added": sorted(added),
        "before_sha256": before,
        "after_sha256": after,
    }


Value = Callable[[Stored], Iterator[Tensor]]


def _values(opened: StreamedModel) -> tuple[dict[str, Value], dict[str, str]]:
    """Return the new values of each tensor that changes, and the names of those that are no longer tied."""
    values: dict[str, Value] = {}
    owners: dict[str, str] = {}
    added: dict[str, str] = {}
    made: dict[str, Any] = {}
    for name, module, own, parameter in _parameters(opened.model):
        stored = opened.stored.get(name)
        if stored is None:
            continue
        streamed = isinstance(module, StreamedMap) and own == "weight"
        if stored in owners and (not streamed or module.changed_like(made[stored])):
            continue
        under = stored
        if stored in owners:
            under = opened.written_under(name)
            added[under] = name
        owners[under], made[under] = name, module
        if streamed and (module.changed or under in added):
            values[under] = _rows_of(module)
        elif not streamed and not torch.equal(parameter, opened.checkpoint.tensor(stored).to(parameter.dtype)):
            values[under] = _rounded(parameter)
    return values, added


def _parameters(model: Any) -> Iterator[tuple[str, Any, str, Tensor]]:
    """Yield (name, module, name in the module, parameter); shared modules appear once per place."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{own}".lstrip("."), module, own, parameter


def _rows_of(module: StreamedMap) -> Value:
    return lambda stored: (chunk.to(DTYPES[stored.dtype]) for _, chunk in module.rows())


def _rounded(parameter: Tensor) -> Value:
    return lambda stored: pieces(parameter.detach().to(DTYPES[stored.dtype]))


def _with_progress(
    files: Mapping[str, Mapping[str, Stored]], what: str, tell: Tell
) -> Iterator[tuple[str, Mapping[str, Stored], Callable[[str], None]]]:
    """Yield the files, each with a function to call with the name of every tensor that is done."""
    total, done = sum(size(stored) for entries in files.values() for stored in entries.values()), 0

    for file, entries in files.items():

        def told(name: str, entries: Mapping[str, Stored] = entries) -> None:
            nonlocal done
            done += size(entries[name])
            tell(what, done / max(total, 1))

        yield file, entries, told


def _write_index(checkpoint: Checkpoint, files: Mapping[str, Mapping[str, Stored]], folder: Path) -> None:
    """Write the index of tensors to files, if the source has one."""
    if checkpoint.index is None:
        return
    index = dict(checkpoint.index)
    index["weight_map"] = {name: file for file, entries in files.items() for name in entries}
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        total = sum(size(stored) for entries in files.values() for stored in entries.values())
        index["metadata"] = index["metadata"] | {"total_size": total}
    write_file(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())


def _write_config(checkpoint: Checkpoint, folder: Path, untied: bool) -> None:
    """Copy config.json; a head that is no longer tied to the embedding clears tie_word_embeddings."""
    config = checkpoint.config | ({"tie_word_embeddings": False} if untied else {})
    if config == checkpoint.config:
        shutil.copyfile(checkpoint.folder / CONFIG_FILE, folder / CONFIG_FILE)
    else:
        write_file(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def _copy_others(source: Path, folder: Path, without: tuple[str, ...] = ()) -> None:
    for path in others(source):
        if path.name not in without and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Create a folder under a temporary name; rename it when all is written, remove it after an error."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        folder.mkdir()
        try:
            yield folder
            sync_folder(folder)
            os.rename(folder, target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check_target(target: Path | None) -> None:
    """Raise RunError for a folder that exists."""
    if target is not None and os.path.lexists(target):
        raise RunError(f"The new folder {target} already exists", "", "choose another name, or remove it")


def _check_space(folder: Path, more: int, files: Mapping[str, Mapping[str, Stored]]) -> None:
    needed = more + sum(size(stored) for entries in files.values() for stored in entries.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        problem = f"The new weights need {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free"
        raise RunError(problem, "", "free some space, or pass --no-delta")


# Undoing -----------------------------------------------------------------------------------------------------------


def _read_proof(folder: Path) -> dict[str, Any]:
    path = folder / PROOF_FILE
    if not path.is_file():
        problem = f"{folder} does not hold {PROOF_FILE}, so it was not written by omninorm convert"
        raise RunError(problem, "", "pass a folder that it wrote")
    proof = read_json(path)
    wanted = {"config": dict, "added": list, "changed_tensors": list, "before_sha256": dict}
    whole = all(isinstance(proof.get(name), kind) for name, kind in wanted.items())
    if whole:
        hashes = proof["before_sha256"].values()
        whole = all(isinstance(each, str) for each in (*proof["added"], *proof["changed_tensors"], *hashes))
    if proof.get("format") != FORMAT or not whole:
        problem = f"{path} is damaged, or of another version of omninorm"
        raise RunError(problem, "", "restore it, or convert the original again")
    return proof


def _read_delta(folder: Path, names: set[str]) -> dict[str, Stored]:
    """Return the saved original tensors."""
    if not names:
        return {}
    path = folder / DELTA_FILE
    remedy = "restore it, or go back to the original"
    if not path.is_file():
        raise RunError(f"Cannot undo: {path}, the original values of changed weights, is missing", "", remedy)
    found = SafetensorsFile(path).entries()
    if missing := sorted(names - set(found)):
        raise RunError(f"Cannot undo: {path} does not hold {missing[0]:.80}", "", remedy)
    return {name: found[name] for name in names}
