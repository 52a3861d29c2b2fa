"""Reader of GGUF files (llama.cpp's format) of the architectures llama and qwen3, quantized or not.

RoPE rotates pairs of a head's features. For llama models, llama.cpp pairs adjacent features, but Hugging Face and
Thinker pair features of the first half with those of the second. llama.cpp's converter therefore reorders the rows of
the query and key matrices; this reader restores their order.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.config import NormConfig, is_finite
from omninorm.errors import ConfigError, MissingExtraError, RunError
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.model import Thinker
from omninorm.thinker.sizes import check_sizes, count_layers, in_terms_of

ARCHITECTURES = ("llama", "qwen3")
_REORDERED = ("llama",)
_NAMES = {
    "attention.q.weight": "attn_q.weight",
    "attention.k.weight": "attn_k.weight",
    "attention.v.weight": "attn_v.weight",
    "attention.out.weight": "attn_output.weight",
    "attention.q_norm.weight": "attn_q_norm.weight",
    "attention.k_norm.weight": "attn_k_norm.weight",
    "feed_forward.gate.weight": "ffn_gate.weight",
    "feed_forward.up.weight": "ffn_up.weight",
    "feed_forward.down.weight": "ffn_down.weight",
    "around_attention.norm.weight": "attn_norm.weight",
    "around_feed_forward.norm.weight": "ffn_norm.weight",
}
_OUTER = {
    "embedding.weight": "token_embd.weight",
    "final_norm.norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
_KEYS = {
    "embedding_length": "d_model",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "context_length": "max_seq_len",
    "feed_forward_length": "d_ff",
}
_EPS = "attention.layer_norm_rms_epsilon"
_KEY_OF = {
    **{ours: theirs for theirs, ours in _KEYS.items()},
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "norm_eps": _EPS,
}
# Tensors that files have if RoPE's frequencies do not follow from rope.freq_base alone.
_SCALED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_REMEDY = "check that the file is whole and holds a language model"
# Limits. A vocabulary has a few hundred thousand tokens, as many types, and twice as many merges.
_MOST_ITEMS, _MOST_ENTRIES = 2**21, 2**15


def load(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Thinker:
    """Return a Thinker with the weights of a GGUF file, dequantized one by one.

    Args:
        path: the file; models in several files are not supported.
        dtype: the floating-point dtype of the weights.

    Raises:
        ConfigError: an architecture or a setting that Thinker does not support.
        RunError: the file is missing or damaged, or a tensor is missing, unexpected or of another shape.
        MissingExtraError: the package gguf is not installed.
    """
    path = Path(path)
    reader = open_gguf(path)
    settings = read_settings(reader)
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    config = _config(path, settings, tensors)
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    names = check_sizes(path, config, shapes, _foreign_name, count_layers(tensors, "blk."))
    with torch.device("meta"):
        model = Thinker(config)
    model.rotary.to_empty(device="cpu")  # computes RoPE's tables, which no file contains
    for ours, theirs in names.items():
        values = _dequantize(tensors[theirs], path)
        if settings["general.architecture"] in _REORDERED and ".attention." in ours:
            heads = {"q.weight": config.n_heads, "k.weight": config.kv_heads}.get(ours.split("attention.")[-1])
            values = values if heads is None else _halves_first(values, heads)
        _place(model, ours, values.to(dtype))
    return model


def open_gguf(path: Path) -> Any:
    """Return gguf's reader of a file.

    Raises:
        RunError: the file is missing or damaged.
        MissingExtraError: the package gguf is not installed.
    """
    reader = _bounded_reader()
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not start with GGUF")
        return reader(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RunError(f"No such file: {path}", "", "check the path") from error
    # For a damaged file, gguf's parser may raise any of these.
    except (
        ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        received = f"{type(error).__name__}: {error}"
        raise RunError(f"{path} must be a whole GGUF file", received[:200], "download it again") from error


def _bounded_reader() -> Any:
    """Return a subclass of gguf's reader with limits.

    If the length of an array is damaged, gguf's own reader takes 20 µs and 1 kB for each of the claimed items, even
    beyond the end of the file.
    """
    try:
        import numpy as np
        from gguf import GGUFReader, GGUFValueType
    except ModuleNotFoundError as error:
        remedy = 'install it with pip install "omninorm[interop]"'
        raise MissingExtraError("Reading GGUF needs the package gguf", "", remedy) from error

    class BoundedReader(GGUFReader):
        """Reads each array of numbers at once."""

        _items = 0  # the number of items in all arrays so far

        def _get(self, offset: int, dtype: Any, count: Any = 1, *order: Any, **orders: Any) -> Any:
            values = super()._get(offset, dtype, count, *order, **orders)
            if len(values) < int(count):
                raise ValueError(f"it ends within a value at byte {offset}")
            return values

        def _build_fields(self, offs: int, count: int) -> int:
            _check_length("settings", int(count), _MOST_ENTRIES)
            return super()._build_fields(offs, count)

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            _check_length("tensors", int(count), _MOST_ENTRIES)
            return super()._build_tensor_info(offs, count)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            self._items += int(length[0])
            _check_length("items in arrays", self._items, _MOST_ITEMS)
            start, types = orig_offs + 12, [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
            if types[1] == GGUFValueType.STRING:
                texts, size = self._texts(start, int(length[0]))
                return 12 + size, [kind, length, *texts], list(range(2, 2 + len(texts))), types
            if types[1] == GGUFValueType.ARRAY:
                raise ValueError("it has an array of arrays")
            values = self._get(start, self.gguf_scalar_to_np[types[1]], length[0])
            return 12 + values.nbytes, [kind, length, values], [2], types

        def _texts(self, start: int, count: int) -> tuple[list[Any], int]:
            """Return `count` consecutive strings, and the number of bytes that they occupy."""
            content, at, texts = np.asarray(self.data), start, []
            order: Any = sys.byteorder if self.byte_order == "I" else {"little": "big", "big": "little"}[sys.byteorder]
            for _ in range(count):
                end = at + 8 + int.from_bytes(content[at : at + 8].tobytes(), order)
                if max(end, at + 8) > len(content):
                    raise ValueError(f"it ends within a string at byte {at}")
                texts.append(content[at + 8 : end])
                at = end
            return texts, at - start

    return BoundedReader


def _check_length(what: str, found: int, most: int) -> None:
    if found > most:
        raise ValueError(f"it claims {found} {what}, and at most {most} are supported")


def read_settings(reader: Any) -> dict[str, Any]:
    """Return the file's metadata, by key."""
    try:
        return {key: field.contents() for key, field in reader.fields.items()}
    except (LookupError, TypeError, ValueError) as error:
        invariant = "The metadata of a GGUF file must be readable"
        raise RunError(invariant, f"{error}"[:200], "download the file again") from error


def _config(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> ThinkerConfig:
    family = settings.get("general.architecture")
    if family not in ARCHITECTURES:
        invariant = f"Only GGUF files of {' and '.join(ARCHITECTURES)} are supported"
        raise ConfigError(invariant, f"{family!r:.80} in {path}", "convert a model of one of these")
    own = {key.removeprefix(f"{family}."): value for key, value in settings.items() if key.startswith(f"{family}.")}
    missing = [key for key in (*_KEYS, _EPS) if key not in own]
    if missing or "token_embd.weight" not in tensors:
        what = f"no {', '.join(missing)}" if missing else "no token_embd.weight"
        raise RunError(f"{path} must describe its model", what, _REMEDY)
    if own.get("rope.scaling.type", "none") != "none" or any(name in tensors for name in _SCALED):
        raise ConfigError(f"Scaled RoPE is not supported, and {path} has it", "", "use a model without it")
    rotated = own.get("rope.dimension_count")
    eps = own[_EPS]
    if not is_finite(eps):
        raise RunError(f"{_EPS} in {path} must be a number", f"{eps!r:.80}", _REMEDY)
    try:
        config = ThinkerConfig(
            vocab_size=_shape(tensors["token_embd.weight"])[0],
            **{ours: own[theirs] for theirs, ours in _KEYS.items()},
            n_kv_heads=own.get("attention.head_count_kv", own["attention.head_count"]),
            head_dim=own.get("attention.key_length") or rotated,
            rope_theta=own.get("rope.freq_base", 10000.0),
            tied_head="output.weight" not in tensors,
            feed_forward="swiglu",
            # The file stores the number as float32; the original number has few digits.
            norm=NormConfig(norm_eps=float(f"{eps:.6g}"), cast="llama", qk_norm=family == "qwen3"),
        )
    except ConfigError as error:
        raise in_terms_of(_KEY_OF, path, error) from error
    if rotated not in (None, config.head_width):
        received = f"rope.dimension_count {rotated!r:.40} with heads of width {config.head_width}"
        raise ConfigError(
            f"RoPE on a part of each head is not supported, and {path} has it", received, "use a model without it"
        )
    return config


def _shape(tensor: Any) -> tuple[int, ...]:
    """Return a tensor's shape in torch's order. A tensor without dimensions has a single element."""
    return tuple(int(size) for size in reversed(tensor.shape.tolist())) or (1,)


def _foreign_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, number, rest = name.split(".", 2)
    return f"blk.{number}.{_NAMES[rest]}"


def _dequantize(tensor: Any, path: Path) -> Tensor:
    import gguf
    import numpy as np

    try:
        with np.errstate(all="ignore"):
            values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        return torch.from_numpy(values.reshape(_shape(tensor)).copy())
    except (NotImplementedError, ValueError, TypeError, LookupError) as error:
        invariant = f"{tensor.name} in {path} must have a quantization that gguf reads"
        received = f"{tensor.tensor_type.name} ({error!s:.100})"
        raise RunError(invariant, received, "use another file") from error


def _halves_first(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of every head from (x₀, y₀, x₁, y₁, …) to (x₀, x₁, …, y₀, y₁, …)."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _place(model: nn.Module, name: str, values: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(values))
