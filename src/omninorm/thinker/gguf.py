"""Reading GGUF files of the architectures llama and qwen3, quantized or not: llama.cpp's format.

llama.cpp turns neighbouring pairs of a head's features by RoPE in llama models, Hugging Face and Thinker the first half
with the second; its converter has therefore reordered the rows of the query and key matrices, which is undone here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.errors import ConfigError, MissingExtraError, RunError
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.model import Thinker

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
# RoPE's frequencies, where they are not what rope.freq_base alone gives.
_SCALED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_REMEDY = "check that the file is whole, and a language model's"


def load(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Thinker:
    """A Thinker with the weights of a GGUF file, dequantized one by one.

    Args:
        path: one file; of a model in several parts, none can be read.
        dtype: of the weights, a floating-point type.

    Raises:
        ConfigError: an architecture or a setting that Thinker does not have.
        RunError: the file is missing or damaged, or a tensor is missing, unexpected or of another shape.
        MissingExtraError: the package gguf is not installed.
    """
    reader = open_gguf(Path(path))
    settings = read_settings(reader)
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    config = _config(settings, tensors)
    with torch.device("meta"):
        model = Thinker(config)
    model.rotary.to_empty(device="cpu")  # which computes its tables
    wanted = {_foreign_name(name): name for name, _ in model.named_parameters()}
    _check_names(set(tensors), set(wanted), Path(path))
    for theirs, ours in wanted.items():
        values = _dequantize(tensors[theirs], Path(path))
        if settings["general.architecture"] in _REORDERED and ".attention." in ours:
            heads = {"q.weight": config.n_heads, "k.weight": config.kv_heads}.get(ours.split("attention.")[-1])
            values = values if heads is None else _halves_first(values, heads)
        _place(model, ours, values.to(dtype), theirs)
    return model


def open_gguf(path: Path) -> Any:
    """gguf's reader of a file.

    Raises:
        RunError: it is missing or damaged.
        MissingExtraError: the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        remedy = "install it by `pip install 'omninorm[interop]'`"
        raise MissingExtraError("reading GGUF needs the package gguf", "an environment without it", remedy) from error
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
        return GGUFReader(path)
    # What gguf raises for a damaged file is whatever its parsing stumbles over.
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, TypeError, ValueError) as error:
        received = f"{type(error).__name__}: {error}"
        raise RunError(f"{path} must be a whole GGUF file", received[:200], "download it again") from error


def read_settings(reader: Any) -> dict[str, Any]:
    """The file's metadata, by key."""
    try:
        return {key: field.contents() for key, field in reader.fields.items()}
    except (LookupError, TypeError, ValueError) as error:
        raise RunError("a GGUF file's metadata must be readable", f"{error}"[:200], "download it again") from error


def _config(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> ThinkerConfig:
    family = settings.get("general.architecture")
    if family not in ARCHITECTURES:
        remedy = "convert a model of one of these"
        raise ConfigError(f"Thinker reads GGUF files of {' and '.join(ARCHITECTURES)}", f"{family!r}", remedy)
    own = {key.removeprefix(f"{family}."): value for key, value in settings.items() if key.startswith(f"{family}.")}
    missing = [key for key in (*_KEYS, "attention.layer_norm_rms_epsilon") if key not in own]
    if missing or "token_embd.weight" not in tensors:
        what = f"no {', '.join(missing)}" if missing else "no token_embd.weight"
        raise RunError("a GGUF file must describe its model", what, _REMEDY)
    scaled = own.get("rope.scaling.type", "none") != "none" or any(name in tensors for name in _SCALED)
    if scaled:
        raise ConfigError("Thinker computes plain RoPE", "a file with scaled RoPE", "use a model without it")
    heads = own["attention.head_count"]
    width = own.get("attention.key_length") or own.get("rope.dimension_count")
    return ThinkerConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        **{ours: own[theirs] for theirs, ours in _KEYS.items()},
        n_kv_heads=own.get("attention.head_count_kv", heads),
        head_dim=width,
        rope_theta=own.get("rope.freq_base", 10000.0),
        tied_head="output.weight" not in tensors,
        feed_forward="swiglu",
        # The file keeps float32; the number that was meant has few digits.
        norm=NormConfig(
            norm_eps=float(f"{own['attention.layer_norm_rms_epsilon']:.6g}"), cast="llama", qk_norm=family == "qwen3"
        ),
    )


def _foreign_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, number, rest = name.split(".", 2)
    return f"blk.{number}.{_NAMES[rest]}"


def _check_names(found: set[str], expected: set[str], path: Path) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        raise RunError(f"{path} must hold every tensor of its model", f"no {', '.join(missing[:3])}", _REMEDY)
    if extra:
        raise RunError(f"{path} must hold the tensors of its model only", f"also {', '.join(extra[:3])}", _REMEDY)


def _dequantize(tensor: Any, path: Path) -> Tensor:
    import gguf
    import numpy as np

    try:
        values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        shape = [int(size) for size in reversed(tensor.shape.tolist())]
        return torch.from_numpy(values.reshape(shape).copy())
    except (NotImplementedError, ValueError, TypeError, LookupError) as error:
        received = f"{tensor.name} of type {tensor.tensor_type.name} in {path} ({error})"
        raise RunError("a tensor's quantization must be one that gguf reads", received, "use another file") from error


def _halves_first(weight: Tensor, heads: int) -> Tensor:
    """Rows of every head from (x₀, y₀, x₁, y₁, …) to (x₀, x₁, …, y₀, y₁, …)."""
    rows, width = weight.shape
    if rows % (2 * heads):
        raise RunError("a head must have an even number of rows", f"{rows} rows for {heads} heads", _REMEDY)
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _place(model: nn.Module, name: str, values: Tensor, source: str) -> None:
    expected = model.get_parameter(name).shape
    if values.shape != expected:
        invariant = f"{source} must be of shape {tuple(expected)}"
        raise RunError(invariant, f"the shape {tuple(values.shape)}", _REMEDY)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(values))
