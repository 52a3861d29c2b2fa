"""Reading Hugging Face folders of Llama and Qwen3: config.json and safetensors, whole or in shards; no pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.errors import ConfigError, InputError, RunError
from omninorm.record.tensors import open_safetensors
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.model import Thinker

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD = "lm_head.weight"
# Old checkpoints hold RoPE's frequencies too, which follow from the config.
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
# What Thinker does not have: the key, the values under which it makes no difference, and what it would be otherwise.
_FOREIGN: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("hidden_act", ("silu",), "another activation than silu"),
    ("attention_bias", (False, None), "biases in attention"),
    ("mlp_bias", (False, None), "biases in the feed-forward"),
    ("use_sliding_window", (False, None), "sliding-window attention"),
    ("quantization_config", (None,), "quantized weights"),
)


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Thinker:
    """A Thinker with the weights in `folder`; its logits equal transformers' up to rounding.

    The tensors are read one by one, so that memory peaks at the model and one tensor more.

    Args:
        folder: holds config.json and either model.safetensors or model.safetensors.index.json with its shards.
        dtype: of the weights, a floating-point type.

    Raises:
        ConfigError: an architecture or a setting that Thinker does not have.
        RunError: a file is missing, damaged or no JSON; a tensor is missing, unexpected or of another shape.
        InputError: a dtype that is not floating-point.
        MissingExtraError: safetensors is not installed.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError("weights have a floating-point dtype", str(dtype), "pass e.g. torch.float32 or torch.bfloat16")
    folder = Path(folder)
    config = read_config(folder)
    files = _locate(folder)
    with torch.device("meta"):
        model = Thinker(config)
    model.rotary.to_empty(device="cpu")  # which computes its tables
    ours = {_foreign_name(name): name for name, _ in model.named_parameters()}
    _check_names(folder, set(files), set(ours), config.tied_head)
    for theirs, name in ours.items():
        _place(model, name, _read_tensor(files[theirs], theirs), f"{theirs} in {files[theirs]}", dtype)
    if config.tied_head and _HEAD in files:
        _check_tied(folder, model, _read_tensor(files[_HEAD], _HEAD))
    return model


def read_config(folder: str | Path) -> ThinkerConfig:
    """The ThinkerConfig that computes what config.json in `folder` describes.

    Raises:
        ConfigError: an architecture or a setting that Thinker does not have.
        RunError: config.json is missing, no JSON, or lacks a key.
    """
    path = Path(folder) / "config.json"
    values = _read_json(path)
    family = _family(values)
    for key, harmless, what in _FOREIGN:
        if values.get(key, harmless[0]) not in harmless:
            raise _unsupported(f"{what} ({key}={values[key]!r})")
    layer_types = values.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        raise _unsupported(f"layer_types={sorted(set(layer_types))}")
    required = [*_REQUIRED, *(["head_dim", "num_key_value_heads"] if family == "qwen3" else [])]
    missing = [key for key in required if key not in values]
    if missing:
        raise RunError(f"{path} must have the keys {', '.join(required)}", f"no {', '.join(missing)}", "add them")
    return ThinkerConfig(
        **{ours: values[theirs] for theirs, ours in _REQUIRED.items()},
        n_kv_heads=values.get("num_key_value_heads"),
        head_dim=values.get("head_dim"),
        rope_theta=_rope_theta(values),
        tied_head=values.get("tie_word_embeddings", False),
        feed_forward="swiglu",
        # transformers rounds the normalized values before it multiplies by the gain.
        norm=NormConfig(norm_eps=values.get("rms_norm_eps", 1e-6), cast="llama", qk_norm=family == "qwen3"),
    )


def _family(values: Mapping[str, Any]) -> str:
    names = values.get("architectures") or []
    if not names and values.get("model_type") in _ARCHITECTURES.values():
        return str(values["model_type"])
    if len(names) != 1 or names[0] not in _ARCHITECTURES:
        raise _unsupported(f"the architecture {', '.join(map(str, names)) or values.get('model_type')!r}")
    return _ARCHITECTURES[names[0]]


def _rope_theta(values: Mapping[str, Any]) -> float:
    # transformers 5 writes rope_parameters; before it rope_theta stood alone, beside rope_scaling for scaled RoPE.
    rope = {**values}
    for key in ("rope_scaling", "rope_parameters"):
        part = values.get(key) or {}
        kind = part.get("rope_type", part.get("type", "default")) if isinstance(part, Mapping) else part
        if kind != "default":
            raise _unsupported(f"scaled RoPE ({key} of type {kind!r})")
        rope.update(part)
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise _unsupported(f"RoPE on a part of each head (partial_rotary_factor={share!r})")
    theta: float = rope.get("rope_theta", 10000.0)
    return theta


def _unsupported(what: str) -> ConfigError:
    remedy = "use a folder of one of these without scaled RoPE, biases, sliding windows or quantization"
    return ConfigError(f"Thinker computes what {' and '.join(_ARCHITECTURES)} do", what, remedy)


def _locate(folder: Path) -> dict[str, Path]:
    """Every tensor in the folder's safetensors and the file that holds it."""
    index = folder / _INDEX
    names = _shards(index) if index.exists() else [_WEIGHTS]
    return {tensor: folder / name for name in names for tensor in _names(folder / name)}


def _shards(index: Path) -> list[str]:
    shards = _read_json(index).get("weight_map")
    names = sorted(set(shards.values())) if isinstance(shards, Mapping) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        invariant = f"{index} must have a weight_map from tensors to files beside it"
        raise RunError(invariant, repr(shards)[:80], "download it again")
    return names


def _names(path: Path) -> list[str]:
    with _open(path) as tensors:
        return list(tensors.keys())


def _read_tensor(path: Path, name: str) -> Tensor:
    with _open(path) as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor


def _open(path: Path) -> Any:
    if not path.exists():
        raise RunError(f"{path.parent} must hold its weights as safetensors", f"no {path.name}", "download it")
    return open_safetensors(path)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        remedy = "pass the folder that config.json and the weights lie in"
        raise RunError(f"{path.parent} must hold {path.name}", "a folder without it, or none", remedy) from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} must be JSON", str(error), "download it again") from error
    if not isinstance(values, Mapping):
        raise RunError(f"{path} must be a JSON object", type(values).__name__, "download it again")
    return values


def _foreign_name(name: str) -> str:
    for ours, theirs in _NAMES:
        if name.startswith(ours) or ours.startswith("."):
            name = name.replace(ours, theirs, 1)
    return name


def _check_names(folder: Path, found: set[str], expected: set[str], tied: bool) -> None:
    remedy = "check that config.json belongs to the weights and that every file is whole"
    missing = sorted(expected - found)
    if missing:
        raise RunError(f"{folder} must hold every tensor of its model", f"none named {_some(missing)}", remedy)
    allowed = expected | ({_HEAD} if tied else set())
    extra = sorted(name for name in found - allowed if not name.endswith(_DERIVED))
    if extra:
        raise RunError(f"{folder} must hold the tensors of its model only", f"also {_some(extra)}", remedy)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _place(model: nn.Module, name: str, tensor: Tensor, source: str, dtype: torch.dtype) -> None:
    expected = model.get_parameter(name).shape
    if tensor.shape != expected or not tensor.dtype.is_floating_point:
        received = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        remedy = "check that config.json belongs to the weights"
        raise RunError(f"{source} must be floating-point of shape {tuple(expected)}", received, remedy)
    owner, _, leaf = name.rpartition(".")
    # A copy, so that the parameter does not stay mapped to the file.
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(dtype, copy=True)))


def _check_tied(folder: Path, model: Thinker, head: Tensor) -> None:
    weight = model.embedding.weight
    if not torch.equal(head.to(weight.dtype), weight):
        received = f"a {_HEAD} that differs from the embedding"
        remedy = "set tie_word_embeddings to false in config.json if the head is meant to be its own"
        raise RunError(f"{folder} has tie_word_embeddings=true, so its head is its embedding", received, remedy)
