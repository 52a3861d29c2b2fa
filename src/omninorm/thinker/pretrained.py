"""Reader of Hugging Face folders with Llama and Qwen3 models: config.json and safetensors, in one file or shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.errors import ConfigError, InputError, RunError
from omninorm.record.tensors import FLOATS, open_safetensors
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.model import Thinker
from omninorm.thinker.sizes import check_sizes, count_layers, in_terms_of

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD, _PREFIX = "lm_head.weight", "model."
# Old checkpoints also contain RoPE's frequencies; these are ignored, because they follow from the config.
_DERIVED = "rotary_emb.inv_freq"
_NAMES = (
    ("embedding.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    (".attention.out.", ".self_attn.o_proj."),
    (".attention.q.", ".self_attn.q_proj."),
    (".attention.k.", ".self_attn.k_proj."),
    (".attention.v.", ".self_attn.v_proj."),
    (".attention.", ".self_attn."),
    (".feed_forward.gate.", ".mlp.gate_proj."),
    (".feed_forward.up.", ".mlp.up_proj."),
    (".feed_forward.down.", ".mlp.down_proj."),
    (".around_attention.norm.", ".input_layernorm."),
    (".around_feed_forward.norm.", ".post_attention_layernorm."),
    ("final_norm.norm.", "model.norm."),
    ("head.", "lm_head."),
)
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
}
_KEY_OF = {
    **{ours: theirs for theirs, ours in _REQUIRED.items()},
    "n_kv_heads": "num_key_value_heads",
    "tied_head": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
# Settings that Thinker does not support: the key, the values that turn the setting off, and its description.
_FOREIGN: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("hidden_act", ("silu",), "another activation than silu"),
    ("attention_bias", (False, None), "biases in attention"),
    ("mlp_bias", (False, None), "biases in the feed-forward"),
    ("use_sliding_window", (False, None), "sliding-window attention"),
    ("quantization_config", (None,), "quantized weights"),
)


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Thinker:
    """Return a Thinker with the weights in `folder`; its logits equal transformers' up to rounding.

    The sizes in config.json are compared with the tensors in the files before anything is allocated. The tensors are
    read one by one, so the peak memory is the model plus one tensor.

    Args:
        folder: a folder with config.json and either model.safetensors or model.safetensors.index.json and its shards.
        dtype: the floating-point dtype of the weights.

    Raises:
        ConfigError: an architecture or a setting that Thinker does not support.
        RunError: a file is missing, damaged or not JSON; a tensor is missing, unexpected or of another shape.
        InputError: `dtype` is not a floating-point dtype.
        MissingExtraError: safetensors is not installed.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        remedy = "pass for example torch.float32 or torch.bfloat16"
        raise InputError("dtype must be a floating-point dtype of torch", f"{dtype!s:.60}", remedy)
    folder = Path(folder)
    config = read_config(folder)
    files = _locate(folder)
    shapes = {name: stored.shape for name, stored in files.items()}
    ignored = [name for name in files if name.endswith(_DERIVED) or (config.tied_head and name == _HEAD)]
    _check_prefix(folder, files)
    layers = count_layers(files, _PREFIX + "layers.")
    names = check_sizes(folder, config, shapes, _foreign_name, layers, ignored, source="config.json")
    _check_types(files, names.values())
    with torch.device("meta"):
        model = Thinker(config)
    model.rotary.to_empty(device="cpu")  # computes RoPE's tables, which no file contains
    for name, theirs in names.items():
        _place(model, name, _read_tensor(files[theirs].path, theirs).to(dtype, copy=True))
    if config.tied_head and _HEAD in files:
        _check_tied(folder, model, _read_tensor(files[_HEAD].path, _HEAD))
    return model


def read_config(folder: str | Path) -> ThinkerConfig:
    """Return the ThinkerConfig of the model that config.json in `folder` describes.

    Raises:
        ConfigError: an architecture or a setting that Thinker does not support.
        RunError: config.json is missing, not JSON, or lacks a key.
    """
    path = Path(folder) / "config.json"
    values = _read_json(path)
    family = _family(values)
    for key, harmless, what in _FOREIGN:
        if values.get(key, harmless[0]) not in harmless:
            raise _unsupported(f"{what} ({key}={values[key]!r:.80})")
    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise _unsupported(f"layer_types={layer_types!r:.80}")
    required = [*_REQUIRED, *(["head_dim", "num_key_value_heads"] if family == "qwen3" else [])]
    missing = [key for key in required if key not in values]
    if missing:
        invariant = f"{path} must have the keys {', '.join(required)}"
        raise RunError(invariant, f"no {', '.join(missing)}", "add the missing keys")
    try:
        return ThinkerConfig(
            **{ours: values[theirs] for theirs, ours in _REQUIRED.items()},
            n_kv_heads=values.get("num_key_value_heads"),
            head_dim=values.get("head_dim"),
            rope_theta=_rope_theta(values),
            tied_head=values.get("tie_word_embeddings", False),
            feed_forward="swiglu",
            # transformers rounds the normalized values before the product with the gain.
            norm=NormConfig(norm_eps=values.get("rms_norm_eps", 1e-6), cast="llama", qk_norm=family == "qwen3"),
        )
    except ConfigError as error:
        raise in_terms_of(_KEY_OF, path, error) from error


def _family(values: Mapping[str, Any]) -> str:
    names = values.get("architectures") or []
    if not names and values.get("model_type") in list(_ARCHITECTURES.values()):
        return str(values["model_type"])
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        what = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
        remedy = "run other models with transformers; omninorm.watch, inspect and convert support them"
        error = _unsupported(f"the architecture {what or values.get('model_type')!s:.80}")
        raise ConfigError(error.invariant, error.received, remedy)
    return _ARCHITECTURES[name]


def _rope_theta(values: Mapping[str, Any]) -> float:
    # transformers 5 writes rope_parameters; earlier versions write rope_theta, and rope_scaling for scaled RoPE.
    rope = {**values}
    for key in ("rope_scaling", "rope_parameters"):
        part = values.get(key) or {}
        kind = part.get("rope_type", part.get("type", "default")) if isinstance(part, Mapping) else part
        if kind != "default":
            raise _unsupported(f"scaled RoPE ({key} of type {kind!r:.80})")
        rope.update(part)
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise _unsupported(f"RoPE on a part of each head (partial_rotary_factor={share!r:.80})")
    theta: float = rope.get("rope_theta", 10000.0)
    return theta


def _unsupported(what: str) -> ConfigError:
    remedy = "use a model without scaled RoPE, biases, sliding windows or quantization"
    return ConfigError(f"Only models of {' and '.join(_ARCHITECTURES)} are supported", what, remedy)


class _Stored(NamedTuple):
    """A tensor in a file, described by the file's header."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def _locate(folder: Path) -> dict[str, _Stored]:
    """Return every tensor in the folder's safetensors."""
    index = folder / _INDEX
    names = _shards(index) if index.exists() else [_WEIGHTS]
    return {name: stored for file in names for name, stored in _describe(folder / file).items()}


def _shards(index: Path) -> list[str]:
    shards = _read_json(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, Mapping) else []
    if not names or not all(map(_is_file_name, names)):
        invariant = f"{index} must have a weight_map from tensors to files next to it"
        raise RunError(invariant, f"{shards!r:.80}", "download it again")
    return sorted(set(names))


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and len(os.fsencode(name)) < 256 and "\0" not in name


def _describe(path: Path) -> dict[str, _Stored]:
    with _open(path) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  a file, not a mapping
        return {name: _Stored(path, tuple(each.get_shape()), str(each.get_dtype())) for name, each in slices.items()}


def _read_tensor(path: Path, name: str) -> Tensor:
    with _open(path) as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor


def _open(path: Path) -> Any:
    if not path.exists():
        raise RunError(f"{path.parent} has no {path.name}", "", "download the weights as safetensors")
    return open_safetensors(path)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        remedy = "pass the folder that holds config.json and the weights"
        raise RunError(f"No {path.name} in {path.parent}", "", remedy) from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{path} must be a readable JSON file", f"{reason!s:.200}", "download it again") from error
    if not isinstance(values, Mapping):
        raise RunError(f"{path} must be a JSON object", type(values).__name__, "download it again")
    return values


def _foreign_name(name: str) -> str:
    for ours, theirs in _NAMES:
        if name.startswith(ours) or ours.startswith("."):
            name = name.replace(ours, theirs, 1)
    return name


def _check_prefix(folder: Path, names: Mapping[str, _Stored]) -> None:
    """Raise RunError if the tensors are named as in a base model, which was saved without its language-model head."""
    bare = _foreign_name("embedding.weight").removeprefix(_PREFIX)
    if bare in names and _PREFIX + bare not in names:
        invariant = f"The tensors in {folder} must have the prefix {_PREFIX!r} of a causal language model"
        remedy = "save the whole model with AutoModelForCausalLM, or rename the tensors"
        raise RunError(invariant, f"{bare} without it", remedy)


def _check_types(files: Mapping[str, _Stored], names: Iterable[str]) -> None:
    for name in names:
        if files[name].dtype not in FLOATS:
            invariant = f"{name} in {files[name].path} must be floating-point"
            raise RunError(invariant, files[name].dtype, "use a model that is not quantized")


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def _check_tied(folder: Path, model: Thinker, head: Tensor) -> None:
    weight = model.embedding.weight
    if not torch.equal(head.to(weight.dtype), weight):
        invariant = f"{_HEAD} in {folder} differs from the embedding, but config.json has tie_word_embeddings=true"
        raise RunError(invariant, "", "set tie_word_embeddings to false if the head is meant to be its own")
