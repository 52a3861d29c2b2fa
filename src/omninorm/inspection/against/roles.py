"""Gives a tensor the same name in every format: GGUF's name, with "#3" for the fourth expert.

model.layers.7.self_attn.q_proj.weight, transformer.h.7.…, blocks.7.attention.q.weight → blk.7.attn_q.weight
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from omninorm.inspection.names import place

_PREFIX = re.compile(r"^(?:(?:language_model|text_model|model|transformer|backbone|gpt_neox|base_model)\.)+")
_LEAF = re.compile(r"\.(weight|bias|gamma|beta)$")
_LEAVES = {"gamma": "weight", "beta": "bias"}
_TOWER = re.compile(r"vision|visual|audio|encoder|decoder")
_EXPERT = re.compile(r"^(?:mlp|block_sparse_moe|feed_forward|ffn|moe)\.experts\.(\d+)\.(.+)$")
_GGUF_EXPERT = re.compile(r"^ffn_(gate|up|down)\.(\d+)$")
_ATTENTION = r"(?:self_attn|self_attention|attn|attention)\."
_FEED_FORWARD = r"(?:mlp|feed_forward|ffn|block_sparse_moe|moe)\."
# The first pattern that matches applies. It must match the whole name inside the block, without "weight" or "bias".
_IN_BLOCK = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"input_layernorm|ln_1|attention_norm|around_attention\.norm", "attn_norm"),
        (r"post_attention_layernorm", "post_attention_norm"),
        (r"pre_feedforward_layernorm|ln_2|around_feed_forward\.norm", "ffn_norm"),
        (r"post_feedforward_layernorm", "post_ffw_norm"),
        (_ATTENTION + r"(q|k)_(?:norm|layernorm)", r"attn_\1_norm"),
        (_ATTENTION + r"(?:query_key_value|qkv_proj|Wqkv|c_attn|qkv)", "attn_qkv"),
        (_ATTENTION + r"([qkv])(?:_proj)?|" + _ATTENTION + r"w([qkv])", r"attn_\1\2"),
        (_ATTENTION + r"(?:o_proj|out_proj|c_proj|out|wo|dense)", "attn_output"),
        (_FEED_FORWARD + r"(?:experts|switch_mlp)\.(gate|up|down|gate_up)_proj", r"ffn_\1_exps"),
        (r"(?:mlp|block_sparse_moe)\.(?:gate|router)", "ffn_gate_inp"),
        (_FEED_FORWARD + r"gate_up_proj", "ffn_gate_up"),
        (_FEED_FORWARD + r"(?:gate_proj|gate|w1)", "ffn_gate"),
        (_FEED_FORWARD + r"(?:up_proj|up|c_fc|w3|fc1|dense_h_to_4h)", "ffn_up"),
        (_FEED_FORWARD + r"(?:down_proj|down|c_proj|w2|fc2|dense_4h_to_h)", "ffn_down"),
    )
)
_EXPERT_PARTS = {
    "w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "gate_up_proj": "gate_up",
}  # fmt: skip
_OUTSIDE = {
    "embed_tokens": "token_embd", "wte": "token_embd", "embedding": "token_embd", "embed_in": "token_embd",
    "tok_embeddings": "token_embd", "wpe": "position_embd", "norm": "output_norm", "ln_f": "output_norm",
    "final_norm.norm": "output_norm", "final_layernorm": "output_norm", "final_layer_norm": "output_norm",
    "lm_head": "output", "head": "output", "embed_out": "output",
}  # fmt: skip
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
"""Fused roles, with the roles whose rows they contain one after the other."""

GgufName = Callable[[str], "str | None"]


def canonical_names(names: Iterable[str], gguf_name: GgufName | None = None) -> dict[str, str]:
    """Return each tensor's common name. Names that no rule matches only lose a leading "model.".

    Args:
        names: the names in one checkpoint.
        gguf_name: llama.cpp's table of names for the architecture, which takes precedence.
    """
    found = {name: _canonical(name, gguf_name) for name in names}
    roles = {each.split(".")[2] for each in found.values() if each.startswith("blk.") and each.count(".") > 1}
    if "post_attention_norm" in roles and not roles & {"ffn_norm", "post_ffw_norm"}:
        # Llama's post_attention_layernorm is before the feed-forward layer, Gemma's at the end of attention.
        found = {name: each.replace(".post_attention_norm.", ".ffn_norm.") for name, each in found.items()}
    return _unique(found)


def role_of(key: str) -> str:
    """Return a common name with its block and expert replaced by "*".

    >>> role_of("blk.7.ffn_up_exps.weight#3")
    'blk.*.ffn_up_exps.weight'
    """
    return place(key.partition("#")[0], ()).role


def _unique(found: dict[str, str]) -> dict[str, str]:
    """Return the stored name instead of a common name that another tensor already has."""
    seen: set[str] = set()
    for name, key in found.items():
        found[name] = name if key in seen else key
        seen.add(found[name])
    return found


def _canonical(name: str, gguf_name: GgufName | None) -> str:
    short = _PREFIX.sub("", name)
    where = place(short, ())
    if name.startswith("blk.") and not _GGUF_EXPERT.match(_inside(name, where.layer)[0]):
        return name
    if _TOWER.search(name):
        return _from_whole_name(name, gguf_name) or short
    if where.layer is None:
        stem, leaf = _split(short)
        return f"{_OUTSIDE.get(stem, stem)}{leaf}"
    inside, leaf = _inside(short, where.layer)
    if not leaf and ".experts." in f".{inside}":  # a stack of experts, whose parameters are named after their layers
        inside, leaf = (inside[:-5], ".bias") if inside.endswith("_bias") else (inside, ".weight")
    role = _expert(inside, where.block, leaf) or _from_table(inside, where.block, leaf, gguf_name)
    return role or next((f"blk.{where.block}.{each}{leaf}" for each in _roles(inside)), short)


def _inside(name: str, layer: str | None) -> tuple[str, str]:
    """Return the name inside the block, and ".weight" or ".bias"."""
    return _split(name if layer is None else name[len(layer) + 1 :])


def _split(name: str) -> tuple[str, str]:
    leaf = _LEAF.search(name)
    return (name[: leaf.start()], f".{_LEAVES.get(leaf[1], leaf[1])}") if leaf else (name, "")


def _expert(inside: str, block: int | None, leaf: str) -> str | None:
    ours, theirs = _EXPERT.match(inside), _GGUF_EXPERT.match(inside)
    if theirs:
        return f"blk.{block}.ffn_{theirs[1]}_exps{leaf}#{theirs[2]}"
    part = _EXPERT_PARTS.get(ours[2]) if ours else None
    return f"blk.{block}.ffn_{part}_exps{leaf}#{ours[1]}" if ours and part else None


def _from_table(inside: str, block: int | None, leaf: str, gguf_name: GgufName | None) -> str | None:
    if gguf_name is None or ".experts." in inside or "switch_mlp" in inside:
        return None
    names = (f"{stack}.{block}.{inside}" for stack in ("model.layers", "transformer.h", "gpt_neox.layers"))
    found = next((each for name in names if (each := gguf_name(name)) is not None), None)
    return f"{found}{leaf}" if found else None


def _from_whole_name(name: str, gguf_name: GgufName | None) -> str | None:
    """Return llama.cpp's name of an encoder's tensor, such as BERT's."""
    stem, leaf = _split(name)
    found = gguf_name(stem) or gguf_name(stem.partition(".")[2]) if gguf_name is not None else None
    return f"{found}{leaf}" if found else None


def _roles(inside: str) -> Iterable[str]:
    for pattern, role in _IN_BLOCK:
        if found := pattern.fullmatch(inside):
            yield found.expand(role)
