"""Surgery on a checkpoint: a Hugging Face folder in, another one out, with the plan and the proof in surgery.json.

The model is loaded by transformers, whole, and written by it: the new folder loads in transformers as the old one did.
Therefore nothing is folded into a bias that the class does not have, and centred LayerNorms stay LayerNorms.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import ConfigError, MissingExtraError, RunError
from omninorm.record.files import write_file, writing
from omninorm.surgery.center import center
from omninorm.surgery.fold import fold_gains
from omninorm.surgery.report import Surgery
from omninorm.surgery.verify import distance, outputs

OPERATIONS = ("fold", "center")
PROOF_FILE, DELTA_FILE, CONFIG_FILE = "surgery.json", "surgery_delta.safetensors", "config.json"
FORMAT = 1
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WRITTEN_ANEW = (".safetensors", *_PICKLED)


@dataclass(frozen=True)
class Conversion:
    """What was done, or would be.

    Args:
        operation: "fold" or "center".
        changed, refused: as in the report of the operation.
        error: the largest difference of the outputs in float64, over the largest.
        rounded: the same in the checkpoint's own dtype, where every changed weight was rounded once.
    """

    operation: str
    changed: Mapping[str, str]
    refused: Mapping[str, str]
    error: float
    rounded: float


def convert(source: Path, target: Path | None, operation: str, *, keep_delta: bool = True) -> Conversion:
    """Folds the gains of a checkpoint's norms, or centres it, and writes another one.

    Args:
        source: a folder with config.json and safetensors; it is only read.
        target: a folder that does not exist; None writes nothing.
        operation: "fold" or "center".
        keep_delta: keep the weights that were changed beside the new ones, so that `undo` can restore them.

    Raises:
        RunError: the source is no such folder, or damaged; the target exists or can't be written; or there is nothing
            that can be done, or it could not be proved.
        ConfigError: a model of another class than transformers', quantized, or with code of its own.
        MissingExtraError: transformers or safetensors is not installed.
    """
    if operation not in OPERATIONS:
        raise ConfigError(f"an operation is one of {', '.join(OPERATIONS)}", repr(operation), "choose one")
    check_folder(source)
    _check_target(target)
    model = _load(source)
    report, rounded = _operate(model, operation)
    if not report.changed:
        why = next(iter(report.refused.items()), ("the model", "it has no such norms"))
        raise RunError(f"there must be something to {operation}", f"{why[0]}: {why[1]}", "see docs/surgery.md")
    done = Conversion(operation, report.changed, report.refused, report.error, rounded)
    if target is not None:
        with _new_folder(target) as folder:
            _write(model, source, folder, done, keep_delta)
    return done


def undo(source: Path, target: Path) -> None:
    """Restores what `convert` changed, bit for bit, from the weights that it kept.

    Raises:
        RunError: the folder was not converted, its weights were not kept or have changed, or the target can't be
            written.
    """
    check_folder(source)
    _check_target(target)
    proof = _read_proof(source)
    delta_file = source / DELTA_FILE
    if not delta_file.is_file():
        raise RunError(
            "an undo needs the weights that were changed", f"no {DELTA_FILE} in {source}", "convert it again"
        )
    tensors = {name: value for path in _weight_files(source) for name, value in _read(path).items()}
    for name in proof["added"]:
        tensors.pop(name, None)
    tensors.update(_read(delta_file))
    if _digest(tensors) != proof["before_sha256"]:
        raise RunError("undone weights must be those before", "others: the files have been changed", "restore them")
    with _new_folder(target) as folder:
        _save(tensors, folder / "model.safetensors")
        write_file(folder / CONFIG_FILE, (json.dumps(proof["config"], indent=2) + "\n").encode())
        _copy_others(source, folder, without=(PROOF_FILE, DELTA_FILE))


def check_folder(folder: Path) -> None:
    """Raises RunError for what is no folder of a model with whole safetensors, or reaches out of itself."""
    if not (folder / CONFIG_FILE).is_file():
        raise RunError("a model's folder must hold config.json", str(folder), "name a Hugging Face folder")
    inside = folder.resolve()
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(inside):
            raise RunError("a model's files must lie in its folder", f"the link {path}", "copy the file")
    if not _weight_files(folder):
        pickled = next((path.name for path in folder.iterdir() if path.suffix in _PICKLED), None)
        received = f"{pickled}, which is pickled" if pickled else f"none in {folder}"
        raise RunError("weights must be safetensors", received, "save the model as safetensors first")
    seen: dict[str, Path] = {}
    for path in _weight_files(folder):
        for name in _names(path):
            if name in seen:
                raise RunError("a tensor must stand once", f"{name} in {seen[name].name} and {path.name}", "remove one")
            seen[name] = path


# Parts -----------------------------------------------------------------------------------------------------------


def _load(folder: Path) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[interop]"'
        raise MissingExtraError("converting needs transformers", "an installation without it", remedy) from error
    config = _read_json(folder / CONFIG_FILE)
    names = config.get("architectures") or [None]
    found = getattr(transformers, str(names[0]), None)
    if not isinstance(found, type) or not issubclass(found, nn.Module) or config.get("auto_map"):
        remedy = "use a model that transformers itself has; code that comes with a model is not run"
        raise ConfigError("config.json must name one of transformers' classes", repr(names[0]), remedy)
    if config.get("quantization_config"):
        raise ConfigError("weights must be floating-point", "quantized ones", "dequantize the model first")
    settings = {"local_files_only": True, "use_safetensors": True, "dtype": "auto", "output_loading_info": True}
    try:
        model, info = found.from_pretrained(folder, **settings)  # type: ignore[attr-defined]
    except Exception as error:  # whatever transformers makes of a damaged folder
        said = " ".join(str(error).split())[:300]
        raise RunError(f"{folder} must be a whole model", said, "download it again") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(map(str, info.get(kind) or ())):
            what = f"{kind.replace('_', ' ')}: {', '.join(wrong[:3])}"
            raise RunError("the weights must be those of config.json's class", what, "check that both belong together")
    loaded: nn.Module = model.eval()
    return loaded


def _operate(model: nn.Module, operation: str) -> tuple[Surgery, float]:
    """The operation's report, and how far the outputs moved in the model's own dtype."""
    probes = _probes(model)
    before = [outputs(model, probe) for probe in probes]
    if operation == "fold":
        report = fold_gains(model, probes, new_biases=False)
    else:
        report = center(model, probes, new_biases=False, replace=False)
    after = [outputs(model, probe) for probe in probes]
    return report, max(distance(a, b) for a, b in zip(before, after, strict=True))


def _probes(model: Any) -> list[Any]:
    name, config = getattr(model, "main_input_name", "input_ids"), model.config
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids" and not getattr(config, "is_encoder_decoder", False):
        return [torch.randint(0, config.vocab_size, (2, 16), generator=generator)]
    if name == "pixel_values":
        size = (2, config.num_channels, config.image_size, config.image_size)
        return [{"pixel_values": torch.randn(size, generator=generator).to(model.dtype)}]
    remedy = "load it, and call omninorm.surgery with inputs=[…]"
    raise ConfigError("the model must take tokens or images alone", f"{type(model).__name__} takes {name}", remedy)


def _write(model: Any, source: Path, folder: Path, done: Conversion, keep_delta: bool) -> None:
    config = _read_json(source / CONFIG_FILE)
    model.save_pretrained(folder)
    _copy_others(source, folder)
    after = {name: value for path in _weight_files(folder) for name, value in _read(path).items()}
    stored = {name: value for path in _weight_files(source) for name, value in _read(path).items()}
    changed = {name: value for name, value in stored.items() if name not in after or not _equal(value, after[name])}
    if keep_delta:
        _save(changed, folder / DELTA_FILE)
    proof = {
        "format": FORMAT,
        **asdict(done),
        "changed_tensors": sorted(changed),
        "added": sorted(set(after) - set(stored)),
        "config": config,
        "before_sha256": _digest(stored),
        "after_sha256": _digest(after),
    }
    write_file(folder / PROOF_FILE, (json.dumps(proof, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own when all is written, and else is removed."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        folder.mkdir()
        try:
            yield folder
            os.replace(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check_target(target: Path | None) -> None:
    if target is not None and (target.exists() or target.is_symlink()):
        raise RunError("the new folder must not exist", str(target), "choose another name")


def _copy_others(source: Path, folder: Path, without: tuple[str, ...] = ()) -> None:
    """Tokenizers and the like."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WRITTEN_ANEW or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in without and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _weight_files(folder: Path) -> list[Path]:
    """The files of the weights, by the index where there is one.

    Raises:
        RunError: a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else []
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise RunError("every shard must lie in the folder", f"no {name!r}", "download it again")
    return [folder / name for name in names]


def _names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _read(path: Path) -> dict[str, Tensor]:
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[interop]"'
        raise MissingExtraError("reading weights needs safetensors", "an installation without it", remedy) from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} must be a whole safetensors file", str(error), "download it again") from error


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} must be JSON", str(error), "download it again") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} must be a JSON object", type(found).__name__, "download it again")
    return found


def _read_proof(folder: Path) -> dict[str, Any]:
    if not (folder / PROOF_FILE).is_file():
        raise RunError(f"a converted folder has {PROOF_FILE}", f"none in {folder}", "name one that omninorm wrote")
    proof = _read_json(folder / PROOF_FILE)
    wanted = ("config", "added", "before_sha256")
    if proof.get("format") != FORMAT or any(name not in proof for name in wanted):
        raise RunError(f"{PROOF_FILE} must be whole", str(folder / PROOF_FILE), "name a folder that omninorm wrote")
    return proof


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
