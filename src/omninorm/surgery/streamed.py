"""A model whose matrices stay in their files, so that it runs in float64 with the memory of its largest activations.

Linear layers and embeddings are replaced by `StreamedMap`, which reads its matrix a few rows at a time, each time it is
called. Other parameters are loaded in float64. A change to a streamed matrix is stored as an operation on its rows, so
the model that is verified and the file that is written come from the same arithmetic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import ConfigError, RunError
from omninorm.record.tensors import FLOATS
from omninorm.surgery.build import build
from omninorm.surgery.checkpoint import Checkpoint
from omninorm.surgery.linear import LinearMap, read_linear
from omninorm.surgery.streamed_map import StreamedMap

# Elements of a parameter that is loaded as a whole: 64 MiB in float64.
_LARGEST_LOADED = 2**23
_IN_MEMORY = "load the model, and use the functions of omninorm.surgery on it"


@dataclass
class StreamedModel:
    """A model over a checkpoint.

    Args:
        model: transformers' class, its matrices streamed.
        checkpoint: its weights.
        stored: name of every parameter → name in the checkpoint, the same for tied ones.
    """

    model: Any
    checkpoint: Checkpoint
    stored: dict[str, str]

    def written_under(self, name: str) -> str:
        """Return the name in the file for a parameter that is no longer tied, in the style of the others there."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        stripped = any(key.startswith(prefix) and own == key[len(prefix) :] for key, own in self.stored.items())
        return name.removeprefix(prefix) if stripped else name


def open_model(checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float64) -> StreamedModel:
    """Build transformers' class over a checkpoint.

    Args:
        checkpoint: its folder.
        dtype: of what is loaded; None for the dtypes of the file.

    Raises:
        ConfigError: a model of another class than transformers', quantized, with code of its own, or with a large
            parameter that is neither a linear layer's nor an embedding's.
        RunError: the weights do not fit the class.
        MissingExtraError: transformers is not installed.
    """
    model = build(checkpoint, lambda planned: _names(planned, checkpoint, planned=True))
    opened = StreamedModel(model, checkpoint, {})
    opened.stored = _names(opened.model, checkpoint)
    known: dict[Any, LinearMap | None] = {}
    replaced: dict[int, nn.Module] = {}
    for prefix, parent in list(opened.model.named_modules()):
        for child, module in parent._modules.items():
            name = f"{prefix}.{child}".lstrip(".")
            if module is not None and _matrix(module):
                if id(module) not in replaced:
                    replaced[id(module)] = _streamed(module, name, opened, known)
                parent._modules[child] = replaced[id(module)]
    _load_rest(opened, dtype)
    return opened


# Parts -----------------------------------------------------------------------------------------------------------


def _names(model: Any, checkpoint: Checkpoint, planned: bool = False) -> dict[str, str]:
    """Map every parameter and buffer to its tensor in the files, which may lack the base model's prefix or add it.

    Args:
        model: of the class that config.json names.
        checkpoint: the files.
        planned: the model is on the meta device, so a buffer without a tensor may still be one that the class fills.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict(keep_vars=True)
    tensors |= {name: value for name, value in persistent.items() if name not in tensors}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for stored, renamed in _renamed(model, checkpoint).items():
        for candidate in (renamed, prefix + renamed, renamed.removeprefix(prefix)):
            if candidate in tensors:
                found[candidate] = stored
                break
    first = {id(tensors[name]): stored for name, stored in found.items()}
    missing = []
    for name, tensor in tensors.items():
        if name not in found and id(tensor) in first:
            found[name] = first[id(tensor)]
        elif name not in found and ((tensor.is_meta and not planned) or isinstance(tensor, nn.Parameter)):
            missing.append(name)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [
        name
        for name in sorted(set(checkpoint.names()) - set(found.values()))
        if not any(re.search(pattern, name) for pattern in ignored)
    ]
    shapes = [
        f"{name} of {checkpoint.stored(stored).shape}"
        for name, stored in found.items()
        if checkpoint.stored(stored).shape != tuple(tensors[name].shape)
    ]
    for kind, wrong in (("missing", missing), ("unexpected", unexpected), ("mismatched", shapes)):
        if wrong:
            few = ", ".join(f"{name:.80}" for name in wrong[:3]) + (f" and {len(wrong) - 3} more" if wrong[3:] else "")
            problem = f"The weights do not fit config.json's class {type(model).__name__}: {kind} keys: {few}"
            raise RunError(problem, "", _situation(checkpoint, wrong))
    for name, stored in found.items():
        if isinstance(tensors[name], nn.Parameter) and checkpoint.stored(stored).dtype not in FLOATS:
            problem = (
                f"The weights {stored:.80} have the dtype {checkpoint.stored(stored).dtype}, not a floating-point one"
            )
            raise ConfigError(problem, "", "dequantize the model first")
        other = first.get(id(tensors[name]), stored)
        if other != stored and not planned and not torch.equal(checkpoint.tensor(other), checkpoint.tensor(stored)):
            problem = f"config.json ties {other:.80} to {stored:.80}, but the tensors differ"
            raise RunError(problem, "", "set tie_word_embeddings to false in config.json")
    return found


def _situation(checkpoint: Checkpoint, wrong: list[str]) -> str:
    """The remedy, for the reasons that names tell."""
    names = checkpoint.names()
    if any(name.startswith("_orig_mod.") for name in names):
        return (
            "the model was saved while compiled: remove the prefix _orig_mod. from its names, or save model._orig_mod"
        )
    if any(".lora_" in name for name in names):
        return "these are an adapter's weights: merge them into the model first, with merge_and_unload() of PEFT"
    return "check that config.json and the weights belong to the same model"


def _renamed(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Map names in the file to the names in this version of transformers."""
    names = sorted(checkpoint.names())
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4, whose names are the file's
        return {name: name for name in names}
    try:
        steps = get_model_conversion_mapping(model)
    except (KeyError, TypeError) as error:
        received = f"{getattr(model.config, 'model_type', None)!r:.80}"
        raise RunError(
            "model_type in config.json must be one of transformers'", received, "download it again"
        ) from error
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    found = {}
    for name in names:
        found[name], converted = rename_source_key(name, renamings, converters)
        if converted is not None:
            problem = f"transformers merges the tensor {name:.80} into {found[name]:.80} while loading"
            raise ConfigError(f"{problem}, which convert does not support", "", _IN_MEMORY)
    return found


def _matrix(module: nn.Module) -> bool:
    """Return whether it may be a linear layer or an embedding."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not any(True for _ in module.children())


def _streamed(module: nn.Module, name: str, opened: StreamedModel, known: dict[Any, LinearMap | None]) -> nn.Module:
    """Return a `StreamedMap` for the module, or the module itself if it computes more than its matrix does."""
    weight = opened.checkpoint.tensor(opened.stored[f"{name}.weight"])
    bias = None
    if module._parameters.get("bias") is not None:
        bias = opened.checkpoint.tensor(opened.stored[f"{name}.bias"])
    # Modules of the same class and settings are probed once.
    key = (type(module), tuple(weight.shape), weight.dtype, bias is None, repr(module))
    before = dict(module._parameters)
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    if key not in known:
        known[key] = read_linear(module)
    found = known[key]
    row_scale = _row_scale(module, weight) if found is not None and found.inputs is None else None
    module._parameters.update(before)
    if found is None or (found.inputs is None and row_scale is None):
        return module
    own = None if bias is None else bias.double()
    new = StreamedMap(opened.checkpoint, opened.stored[f"{name}.weight"], found.transposed, own, row_scale)
    for attribute, value in vars(module).items():  # what others may read, such as out_features
        new.__dict__.setdefault(attribute, value)
    return new.eval()


def _row_scale(module: Any, table: Tensor) -> float | None:
    """Return an embedding's factor for its rows, such as Gemma's √width; None if it computes something else."""
    rows = torch.arange(min(4, len(table)))
    expected = table[rows].double()
    module._parameters["weight"] = nn.Parameter(expected, requires_grad=False)
    padding, module.padding_idx = getattr(module, "padding_idx", None), None  # it may lie beyond these few rows
    try:
        found = module(rows[None])[0].double()
    except Exception:  # positions with an offset, for instance
        return None
    finally:
        module.padding_idx = padding
    if found.shape != expected.shape or not bool(expected.any()):
        return None
    scale = float((found * expected).sum() / expected.square().sum())
    return scale if torch.allclose(found, scale * expected, rtol=1e-6) else None


def _load_rest(opened: StreamedModel, dtype: torch.dtype | None) -> None:
    """Load the parameters and buffers that are not streamed."""
    for prefix, module in opened.model.named_modules():
        if isinstance(module, StreamedMap):
            continue
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kind in kinds:
            for own, value in kind.items():
                if value is not None:
                    kind[own] = _loaded(f"{prefix}.{own}".lstrip("."), value, opened, dtype)


def _loaded(name: str, value: Tensor, opened: StreamedModel, dtype: torch.dtype | None) -> Any:
    stored = opened.stored.get(name)
    if stored is None:
        if value.is_meta:
            raise ConfigError(
                f"The buffer {name:.80} has no values, neither in the files nor by its class", "", _IN_MEMORY
            )
        return value.to(dtype) if value.is_floating_point() and dtype else value
    if value.numel() > _LARGEST_LOADED:
        shape = tuple(value.shape)
        problem = f"{stored:.80} of shape {shape} is too large to load, and neither a linear layer nor an embedding"
        raise ConfigError(problem, "", _IN_MEMORY)
    found = opened.checkpoint.tensor(stored)
    found = found.to(dtype if found.is_floating_point() and dtype else found.dtype, copy=True)
    return nn.Parameter(found, requires_grad=False) if isinstance(value, nn.Parameter) else found
