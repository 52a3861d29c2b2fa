"""A model whose matrices stay in their file: it runs in float64 in the memory of its largest layer's activations.

Linear maps and embeddings are replaced by `StreamedMap`, which reads its matrix a few rows at a time, each time it is
called. What else has parameters is loaded in float64. Changes to a streamed matrix are kept as what is to be done to
its rows, so the model that was proved and the file that is written come from the same arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from omninorm.errors import ConfigError, MissingExtraError, RunError
from omninorm.record.tensors import FLOATS
from omninorm.surgery.checkpoint import Checkpoint, check_plain
from omninorm.surgery.linear import LinearMap, read_linear
from omninorm.surgery.report import Surgery

# Numbers of a matrix in float64 at a time: 2 MiB, about a core's second-level cache.
_CHUNK = 2**18
# Of parameters that are no matrices: 64 MiB in float64.
_LARGEST_LOADED = 2**23


class StreamedMap(nn.Module):
    """y = W x + b, or rows of an embedding, in float64, with W in a file.

    Args:
        checkpoint, name: where W is.
        transposed: whether W is stored as (inputs, outputs); an embedding's rows are.
        bias: b, in memory.
        row_scale: of an embedding, what its rows are multiplied by; None for a linear map.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    factor: Tensor | None = None
    centred: bool = False

    def __init__(
        self, checkpoint: Checkpoint, name: str, transposed: bool, bias: Tensor | None, row_scale: float | None
    ) -> None:
        super().__init__()
        self.checkpoint, self.name, self.transposed, self.row_scale = checkpoint, name, transposed, row_scale
        shape = checkpoint.stored(name).shape
        # Without memory of its own: models ask for shape, dtype and device.
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64).expand(shape), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def map(self) -> LinearMap:
        """Its features, as `read_linear` tells them."""
        inputs, outputs = self.weight.shape if self.transposed else self.weight.shape[::-1]
        return LinearMap(self, inputs if self.row_scale is None else None, outputs, self.transposed)

    @property
    def changed(self) -> bool:
        """Whether anything is to be done to the matrix."""
        return self.factor is not None or self.centred

    def scale(self, factor: Tensor | None, shift: Tensor | None, done: Surgery) -> None:
        """W ← W·diag(factor), b ← b + W·shift."""
        assert not self.centred, "folded before it is centred"
        if shift is not None and bool(shift.any()):
            assert self.bias is not None, "a checkpoint's class has no place for a new bias"
            done.keep(self.bias)
            self.bias.add_(self._times(shift[None])[0])
        if factor is not None:
            before = self.factor
            done.later(lambda: setattr(self, "factor", before))
            self.factor = factor if before is None else before * factor

    def center(self, done: Surgery) -> None:
        """Takes the mean over the outputs out of W and b."""
        if not self.centred:
            done.later(lambda: setattr(self, "centred", False))
            self.centred = True
        if self.bias is not None:
            done.keep(self.bias)
            self.bias.sub_(self.bias.mean())

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """The matrix as it is to be, some stored rows at a time."""
        means = self._means() if self.centred and not self.transposed else None
        for part, chunk in self._scaled():
            if self.centred:
                chunk -= chunk.mean(1, keepdim=True) if means is None else means
            yield part, chunk

    def forward(self, x: Tensor) -> Tensor:
        if self.row_scale is not None:
            table = self.checkpoint.tensor(self.name)
            found = table[x].double()
            if self.centred:
                found -= found.mean(-1, keepdim=True)
            return found * self.row_scale
        y = self._times(x.reshape(-1, x.shape[-1]).double())
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)

    def _times(self, x: Tensor) -> Tensor:
        y = x.new_zeros(len(x), self.map.outputs)
        for part, chunk in self.rows():
            if self.transposed:
                y.addmm_(x[:, part], chunk)
            else:
                torch.mm(x, chunk.T, out=y[:, part])
        return y

    def _scaled(self) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk in the memory of the one before."""
        place = torch.empty(max(_CHUNK, self.weight.shape[1]), dtype=torch.float64)
        for part, stored in self.checkpoint.rows(self.name, _CHUNK):
            chunk = place[: stored.numel()].view(stored.shape).copy_(stored)
            if self.factor is not None:
                chunk *= self.factor[part, None] if self.transposed else self.factor
            yield part, chunk

    def _means(self) -> Tensor:
        """Over the outputs, which are the rows."""
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
        """What a parameter that was tied, and is no more, is called in the file: as its neighbours are."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        stripped = any(key.startswith(prefix) and own == key[len(prefix) :] for key, own in self.stored.items())
        return name.removeprefix(prefix) if stripped else name


def open_model(checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float64) -> StreamedModel:
    """Builds transformers' class over a checkpoint.

    Args:
        checkpoint: its folder.
        dtype: of what is loaded; None for the dtypes of the file.

    Raises:
        ConfigError: a model of another class than transformers', quantized, with code of its own, or with a large
            parameter that is neither a linear map's nor an embedding's.
        RunError: the weights are not those of the class.
        MissingExtraError: transformers is not installed.
    """
    opened = StreamedModel(_build(checkpoint), checkpoint, {})
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


class _OnMeta(TorchFunctionMode):
    """What a class allocates before it fills it gets no memory; what it computes, such as frequencies, does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _build(checkpoint: Checkpoint) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[interop]"'
        raise MissingExtraError("converting needs transformers", "an installation without it", remedy) from error
    name = check_plain(checkpoint.config)
    found: Any = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        remedy = "use a model that transformers itself has; code that comes with a model is not run"
        raise ConfigError("config.json must name one of transformers' classes", repr(name), remedy)
    try:
        kind: Any = found.config_class
        config = kind.from_pretrained(checkpoint.folder, local_files_only=True)
        with _OnMeta():
            model: Any = found(config)
        model.tie_weights()
    except Exception as error:  # whatever transformers makes of a damaged folder
        said = " ".join(str(error).split())[:300]
        raise RunError(f"{checkpoint.folder} must be a whole model", said, "download it again") from error
    return model.eval()  # type: ignore[no-any-return]


def _names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Every parameter's and buffer's name in the file, which may leave the base model's prefix out or have it more."""
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
        elif name not in found and (tensor.is_meta or isinstance(tensor, nn.Parameter)):
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
            what = f"{kind} keys: {', '.join(wrong[:3])}"
            raise RunError("the weights must be those of config.json's class", what, "check that both belong together")
    for name, stored in found.items():
        if isinstance(tensors[name], nn.Parameter) and checkpoint.stored(stored).dtype not in FLOATS:
            received = f"{stored}, which is {checkpoint.stored(stored).dtype}"
            raise ConfigError("weights must be floating-point", received, "dequantize the model first")
        other = first.get(id(tensors[name]), stored)
        if other != stored and not torch.equal(checkpoint.tensor(other), checkpoint.tensor(stored)):
            raise RunError("tied weights must be equal", f"{other} and {stored}, which differ", "untie the config")
    return found


def _renamed(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Names in the file → what this version of transformers calls them."""
    names = sorted(checkpoint.names())
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4, whose names are the file's
        return {name: name for name in names}
    try:
        steps = get_model_conversion_mapping(model)
    except TypeError as error:
        received = repr(getattr(model.config, "model_type", None))
        raise RunError("config.json must name a type of model", received, "download it again") from error
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    found = {}
    for name in names:
        found[name], converted = rename_source_key(name, renamings, converters)
        if converted is not None:
            remedy = "load it, and use omninorm.surgery in memory"
            raise ConfigError("a file must hold the tensors of the class", f"{name}, a part of {found[name]}", remedy)
    return found


def _matrix(module: nn.Module) -> bool:
    """Whether it may be a linear map or an embedding."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not any(True for _ in module.children())


def _streamed(module: nn.Module, name: str, opened: StreamedModel, known: dict[Any, LinearMap | None]) -> nn.Module:
    """The module over its file, or itself where it computes something else than its matrix."""
    weight = opened.checkpoint.tensor(opened.stored[f"{name}.weight"])
    bias = None
    if module._parameters.get("bias") is not None:
        bias = opened.checkpoint.tensor(opened.stored[f"{name}.bias"])
    # A class with the same settings computes the same with other weights.
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
    """c, where an embedding returns c times the rows that it is asked for: √width in Gemma. None where it does not."""
    rows = torch.arange(min(4, len(table)))
    expected = table[rows].double()
    module._parameters["weight"] = nn.Parameter(expected, requires_grad=False)
    padding, module.padding_idx = getattr(module, "padding_idx", None), None  # it may be none of these rows
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
    """Parameters and buffers that are not streamed."""
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
            raise ConfigError("every buffer must have values", f"{name}, which the class fills later", "load it whole")
        return value.to(dtype) if value.is_floating_point() and dtype else value
    if value.numel() > _LARGEST_LOADED:
        remedy = "load it, and use omninorm.surgery in memory"
        raise ConfigError("large weights must be linear maps' or embeddings'", f"{stored} of {value.shape}", remedy)
    found = opened.checkpoint.tensor(stored)
    found = found.to(dtype if found.is_floating_point() and dtype else found.dtype, copy=True)
    return nn.Parameter(found, requires_grad=False) if isinstance(value, nn.Parameter) else found
