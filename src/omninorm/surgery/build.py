"""Build transformers' class for a folder: without network, and only where its sizes fit the weights.

The class is built twice. The first time everything is on the meta device, which takes no memory, and stops as soon as
it has more parameters than the files can fill. Only if every parameter has the shape of its tensor is it built again
with values for what a class computes, such as rotary frequencies.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from omninorm.errors import ConfigError, MissingExtraError, OmninormError, RunError
from omninorm.memory import memory_limit
from omninorm.surgery.checkpoint import Checkpoint, check_plain
from omninorm.surgery.writer import size

# Counts for which transformers' configurations make lists, before any module could be refused. Only whole names: other
# settings, such as attn_block_size, may be as large as they like.
_COUNTS = re.compile(
    r"((num|n)_(\w+_)?)?(layers?|heads?|experts|labels|classes|stages|groups?|levels|codebooks|depths?|queries|quantizers)"
    r"|(num|n)_experts_per_tok|(stage_)?(num|n)_((encoder|decoder|attention|res|resnet|upscale|dense)_)?blocks"
    r"|(encoder|decoder|text|vision|audio|speech|cross)_(num_)?((hidden|attention|cross_attention)_)?(layers|heads|depths?)"
    r"|(first_k_dense_replace|attention_types|stage_repeats|layer_repeats|block_repeats)",
    re.IGNORECASE,
)
_MOST_COUNTED, _LONGEST_NUMBER = 2**20, 60
# For each tensor of the files, and as many again for small models.
_PARAMETERS, _MODULES, _SPARE = 4, 40, 1000
_BUFFERS = 2**30  # bytes, besides those of the files; on larger machines a quarter of the memory

Check = Callable[[nn.Module], object]


def build(checkpoint: Checkpoint, check: Check) -> nn.Module:
    """Build the class that config.json names; parameters stay on the meta device.

    Args:
        checkpoint: a folder.
        check: called with the model on the meta device, before anything is allocated; raises if it does not fit.

    Raises:
        ConfigError: a model of another class than transformers', or with sizes that its weights do not have.
        RunError: the class cannot be built from config.json.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[interop]"'
        raise MissingExtraError("Converting needs the package transformers", "", remedy) from error
    name = check_plain(checkpoint.config)
    found: Any = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        remedy = "use a model that transformers itself has; code that comes with a model is not run"
        raise ConfigError("config.json must name one of transformers' model classes", f"{name!r:.80}", remedy)
    _check_counts(checkpoint.config, "")
    try:
        with offline():
            config: Any = found.config_class.from_pretrained(checkpoint.folder, local_files_only=True)  # type: ignore[union-attr]
            _check_planned(found, config, checkpoint, check)
            with _OnMeta():
                model: Any = found(config)
            model.tie_weights()
    except OmninormError:
        raise
    except Exception as error:  # whatever transformers makes of a damaged folder
        raise _unbuilt(checkpoint, name, error) from error
    return model.eval()  # type: ignore[no-any-return]


class _OnMeta(TorchFunctionMode):
    """What a class allocates before it fills it gets no memory; what it computes, such as frequencies, does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _check_counts(value: Any, name: str) -> None:
    """Raise ConfigError for a number of layers, labels or the like that no model has."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_counts(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            _check_counts(inner, name)
    elif isinstance(value, (int, float)) and value > _MOST_COUNTED and _COUNTS.fullmatch(name):
        problem = f"{name:.80} in config.json must be at most {_MOST_COUNTED:,}"
        digits = str(value)
        shown = digits if len(digits) <= _LONGEST_NUMBER else f"a number of {len(digits)} digits"
        raise ConfigError(problem, shown, "check this setting")


def _check_planned(found: Any, config: Any, checkpoint: Checkpoint, check: Check) -> None:
    """Build the class on the meta device, and compare it with the files."""
    with _limited(len(checkpoint.names())), torch.device("meta"):
        try:
            planned = found(config)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" in str(error):  # a class that computes with values while it is built
                return
            raise
    planned.tie_weights()
    check(planned)
    stored = sum(size(each) for entries in checkpoint.files.values() for each in entries.values())
    needed = sum(each.numel() * each.element_size() for each in planned.buffers())
    limit = max(_BUFFERS, (memory_limit() or 0) // 4) + stored
    if needed > limit:
        problem = (
            f"config.json asks for tables of {needed / 1e9:.3g} GB, but at most {limit / 1e9:.3g} GB are allowed here"
        )
        raise ConfigError(problem, "", "check its sizes, such as max_position_embeddings")


@contextmanager
def _limited(tensors: int) -> Iterator[None]:
    """Raise ConfigError as soon as the modules built by this thread outnumber what so many tensors can fill."""
    counts, thread = {"parameters": 0, "modules": 0}, threading.get_ident()
    limits = {"parameters": _PARAMETERS * tensors + _SPARE, "modules": _MODULES * tensors + 10 * _SPARE}

    def counter(kind: str) -> Any:
        def count(module: nn.Module, name: str, value: object) -> None:
            if threading.get_ident() != thread:
                return
            counts[kind] += 1
            if counts[kind] > limits[kind]:
                problem = f"config.json describes more than {limits[kind]} {kind}, but the files hold {tensors} tensors"
                raise ConfigError(problem, "", "check its sizes, such as the number of layers")

        return count

    hooks = (
        register_module_parameter_registration_hook(counter("parameters")),
        register_module_module_registration_hook(counter("modules")),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def offline() -> Iterator[None]:
    """Keep transformers from reaching the Hugging Face Hub, for a backbone's settings for instance."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _unbuilt(checkpoint: Checkpoint, name: str, error: Exception) -> OmninormError:
    """Return the error for a class that could not be built."""
    said = f"{' '.join(str(error).split()):.300}"
    if any(type(each).__name__ == "OfflineModeIsEnabled" for each in _causes(error)):
        return RunError(_missing_part(checkpoint, name), "", "save the model with a transformers that stores it there")
    if isinstance(error, ImportError):
        return MissingExtraError(f"transformers cannot build {name:.80} here ({said})", "", "install what it needs")
    problem = f"transformers cannot build {name:.80} from {checkpoint.folder / 'config.json'} ({said})"
    return RunError(problem, "", "correct it, or download the folder again")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _missing_part(checkpoint: Checkpoint, name: str) -> str:
    backbone = checkpoint.config.get("backbone")
    if isinstance(backbone, str):
        return f"config.json names the backbone {backbone!r:.80}, whose configuration is not in {checkpoint.folder}"
    return f"{name:.80} needs files of the Hugging Face Hub that are not in {checkpoint.folder}"
