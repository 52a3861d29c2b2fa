"""A model whose matrices stay in their files, so that it runs in float64 with the memory of its largest activations.

Linear layers and embeddings are replaced by `StreamedMap`, which reads its matrix a few rows at a time, each time it is
called. Other parameters are loaded in float64. A change to a streamed matrix is stored as an operation on its rows, so
the model that is verified and the file that is written come from the same arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from omninorm.errors import ConfigError, RunError
from omninorm.record.tensors import FLOATS
from omninorm.surgery.build import build
from omninorm.surgery.checkpoint import Checkpoint
from omninorm.surgery.linear import LinearMap, read_linear
from omninorm.surgery.orthogonal import BlockRotation
from omninorm.surgery.report import Surgery

# Elements of a matrix in float64 at a time: 2 MiB, about a core's second-level cache.
_CHUNK = 2**18
# Elements of the columns whose rows are rotated at a time, for each of which the matrix is read once: 16 MiB.
_COLUMNS = 2**21
# Elements of a parameter that is loaded as a whole: 64 MiB in float64.
_LARGEST_LOADED = 2**23
_IN_MEMORY = "load the model, and use the functions of omninorm.surgery on it"


class StreamedMap(nn.Module):
    """y = W x + b, or rows of an embedding, in float64, with W in a file.

    Args:
        checkpoint, name: where W is.
        transposed: whether W is stored as (inputs, outputs); an embedding's rows are.
        bias: b, in memory.
        row_scale: an embedding's factor for its rows; None for a linear layer.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    factor: Tensor | None = None
    centered: bool = False
    turned: Mapping[int, BlockRotation] = MappingProxyType({})

    def __init__(
        self, checkpoint: Checkpoint, name: str, transposed: bool, bias: Tensor | None, row_scale: float | None
    ) -> None:
        super().__init__()
        self.checkpoint, self.name, self.transposed, self.row_scale = checkpoint, name, transposed, row_scale
        shape = checkpoint.stored(name).shape
        # Expanded from one element, so it takes no memory: models only use its shape, dtype and device.
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64).expand(shape), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def map(self) -> LinearMap:
        """Its features, as `read_linear` returns them."""
        inputs, outputs = self.weight.shape if self.transposed else self.weight.shape[::-1]
        return LinearMap(self, inputs if self.row_scale is None else None, outputs, self.transposed)

    @property
    def changed(self) -> bool:
        """Whether the matrix is to be changed."""
        return self.factor is not None or self.centered or bool(self.turned)

    def changed_like(self, other: StreamedMap) -> bool:
        """Return whether another module changes the matrix that they share in the same way."""
        mine, theirs = self.factor, other.factor
        scaled = mine is theirs if mine is None or theirs is None else torch.equal(mine, theirs)
        rotated = self.turned.keys() == other.turned.keys()
        rotated = rotated and all(self.turned[dim].equals(other.turned[dim]) for dim in self.turned)
        return scaled and rotated and self.centered == other.centered

    def scale(self, factor: Tensor | None, shift: Tensor | None, done: Surgery) -> None:
        """Set W ← W·diag(factor), b ← b + W·shift."""
        assert not self.centered, "folded before it is centered"
        assert not self.turned, "folded before it is rotated"
        if shift is not None and bool(shift.any()):
            assert self.bias is not None, "a checkpoint's class has no place for a new bias"
            done.keep(self.bias)
            self.bias.add_(self._times(shift[None])[0])
        if factor is not None:
            before = self.factor
            done.later(lambda: setattr(self, "factor", before))
            self.factor = factor if before is None else before * factor

    def center(self, done: Surgery) -> None:
        """Subtract the mean over the outputs from W and b."""
        assert not self.turned, "centered before it is rotated"
        if not self.centered:
            done.later(lambda: setattr(self, "centered", False))
            self.centered = True
        if self.bias is not None:
            done.keep(self.bias)
            self.bias.sub_(self.bias.mean())

    def turn(self, dim: int, rotation: BlockRotation, done: Surgery) -> None:
        """Rotate the indices of a dimension of W as it is stored."""
        assert dim not in self.turned, "each dimension is rotated once"
        before = self.turned
        done.later(lambda: setattr(self, "turned", before))
        self.turned = {**before, dim: rotation}

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the changed matrix, some stored rows at a time."""
        return self._with_turned_rows() if 0 in self.turned else self._with_turned_columns()

    def _with_turned_columns(self) -> Iterator[tuple[slice, Tensor]]:
        for part, chunk in self._unturned():
            yield part, self.turned[1](chunk) if 1 in self.turned else chunk

    def _with_turned_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the matrix with its rows rotated: it is in memory in the file's dtype, and some columns in float64."""
        rows, columns = self.weight.shape
        done = torch.empty(rows, columns, dtype=self.checkpoint.tensor(self.name).dtype)
        few, many = (max(1, numbers // rows) for numbers in (_CHUNK, _COLUMNS))
        for first in range(0, columns, many):
            place = torch.empty(rows, min(many, columns - first), dtype=torch.float64)
            for part, chunk in self._with_turned_columns():
                place[part] = chunk[:, first : first + many]
            for start in range(0, place.shape[1], few):
                values = self.turned[0](place[:, start : start + few], 0)
                done[:, first + start : first + start + few] = values
        step = max(1, _CHUNK // columns)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            yield part, done[part]

    def _unturned(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the scaled and centered matrix, some stored rows at a time."""
        means = self._means() if self.centered and not self.transposed else None
        for part, chunk in self._scaled():
            if self.centered:
                chunk -= chunk.mean(1, keepdim=True) if means is None else means
            yield part, chunk

    def forward(self, x: Tensor) -> Tensor:
        with _disable_current_modes():  # files are read and multiplied as they are, whatever a proof intercepts
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.row_scale is not None:
            table = self.checkpoint.tensor(self.name)
            found = table[x].double()
            if self.centered:
                found -= found.mean(-1, keepdim=True)
            return (self.turned[1](found) if 1 in self.turned else found) * self.row_scale
        y = self._times(x.reshape(-1, x.shape[-1]).double())
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)

    def _times(self, x: Tensor) -> Tensor:
        """Return W x for each row of x; rotating these vectors is the same as rotating W."""
        inputs, outputs = (0, 1) if self.transposed else (1, 0)
        x = self.turned[inputs].inverse(x) if inputs in self.turned else x
        y = x.new_zeros(len(x), self.map.outputs)
        for part, chunk in self._unturned():
            if self.transposed:
                y.addmm_(x[:, part], chunk)
            else:
                torch.mm(x, chunk.T, out=y[:, part])
        return self.turned[outputs](y) if outputs in self.turned else y

    def _scaled(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield scaled rows; each chunk reuses the memory of the one before."""
        place = torch.empty(max(_CHUNK, self.weight.shape[1]), dtype=torch.float64)
        for part, stored in self.checkpoint.rows(self.name, _CHUNK):
            chunk = place[: stored.numel()].view(stored.shape).copy_(stored)
            if self.factor is not None:
                chunk *= self.factor[part, None] if self.transposed else self.factor
            yield part, chunk

    def _means(self) -> Tensor:
        """Return the mean over the outputs, which are the rows."""
        return sum((chunk.sum(0) for _, chunk in self._scaled()), torch.zeros(())) / len(self.weight)


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
