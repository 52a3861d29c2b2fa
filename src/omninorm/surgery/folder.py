"""Load a whole Hugging Face folder with transformers, offline, and only if it holds a complete set of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from omninorm.errors import OmninormError, RunError
from omninorm.surgery.build import build, offline
from omninorm.surgery.checkpoint import ADAPTER, Checkpoint
from omninorm.surgery.weight_files import PICKLED


def load_transformers(folder: Path) -> nn.Module:
    """Return the model that a folder's config.json names, in the dtype that it or its weights have, in evaluation mode.

    Args:
        folder: with config.json and safetensors; it is only read, no code from it is run, and nothing is unpickled.

    Raises:
        ConfigError: a model of another class than transformers', quantized, or with code of its own.
        RunError: it is no such folder, damaged, or its weights do not fit config.json.
        MissingExtraError: transformers or safetensors is not installed.
    """
    checkpoint = Checkpoint(folder)
    if (folder / ADAPTER).exists():
        problem = f"{folder} holds an adapter next to the model"
        raise RunError(problem, "", "merge it into the model first, with merge_and_unload() of PEFT")
    if any(path.suffix in PICKLED for path in folder.iterdir()) and not any(folder.glob("*.safetensors")):
        raise RunError(f"{folder} must hold safetensors", "pickled weights", "save the model as safetensors first")
    found: Any = type(build(checkpoint, lambda planned: None))
    try:
        with offline(), _quiet():
            model, info = found.from_pretrained(
                folder,
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except OmninormError:
        raise
    except Exception as error:  # whatever transformers makes of a damaged folder
        said = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise RunError(f"transformers cannot load {folder} ({said})", "", "download it again") from error
    _check_complete(folder, info)
    return model.eval()  # type: ignore[no-any-return]


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Raise RunError for weights that are missing, which transformers would draw at random, or left over."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # A mismatched key comes with both shapes.
        if names := sorted(each if isinstance(each, str) else str(each[0]) for each in info.get(kind) or ()):
            few = ", ".join(f"{name:.80}" for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            problem = f"The weights in {folder} do not fit config.json: {kind.replace('_', ' ')}: {few}"
            raise RunError(problem, "", "check that config.json and the weights belong to the same model")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and logging what `_check_complete` reports."""
    from transformers.utils import logging as module

    logging: Any = module
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
