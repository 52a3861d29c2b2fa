"""Derives a tensor's block, role and kind from its name and shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# model.layers.7.…, transformer.h.7.…, blocks.7.…, blk.7.…, encoder.layer.7.…, layers_7.…
_BLOCK = re.compile(r"^((?:.*?\.)?(?:layers?|h|blocks?|blk|resblocks))[._](\d+)(?=\.|$)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<=[._])\d+(?=\.|$)")
# "pre_layrnorm" is a typo in CLIP's parameter names.
_NORM = re.compile(r"norm|layrnorm|(^|[._])ln([._\d]|$)", re.IGNORECASE)
_NOT_NORM = re.compile(r"(^|\.)(alpha|shift|running_mean|running_var|num_batches_tracked)$")
_BIAS = re.compile(r"(^|[._])(bias|beta|b)$", re.IGNORECASE)
_BUFFER = re.compile(
    r"inv_freq|rope_freqs|position_ids|masked_bias|(^|[._])mask|running_(mean|var)|num_batches_tracked|attn\.bias$"
)
# The decay of state-space models has the same initialization in every block, and its columns are not channels.
_TABLE = re.compile(r"(^|\.)A_log$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|head|output|score|classifier)\.weight$")
_EMBEDDING = re.compile(r"embed|embd|(^|\.)(wte|wpe|shared)\.")
_ATTENTION_OUT = re.compile(
    r"(attn|attention)\.(out|wo|o_proj|out_proj|c_proj|proj|dense)\.|attn_output\.|attention\.output\.dense\.|"
    r"self_attention\.dense\.|out_lin\.|Attention\.o\."
)
_FEED_FORWARD_OUT = re.compile(
    r"down_proj\b|ffn_down|feed_forward\.(down|w2)\.|mlp\.(c_proj|fc2|w2|fc_out|proj_out|dense_4h_to_h)\.|"
    r"(^|\.)fc2\.|(?<!attention\.)output\.dense\.|\.w2\b|ffn\.lin2\.|DenseReluDense\.wo\."
)


class Place(NamedTuple):
    """A tensor's place in the model.

    Args:
        kind: "gain", "norm bias", "embedding", "head", "matrix", "vector" (biases and tables) or "buffer".
        role: the name with "*" for every index, which is the same for the same part of each block.
        stack, block: for example "model.layers" and 7; None outside of blocks.
        branch: "attention" or "feed-forward" for the matrix that writes this branch's output to the residual stream.
    """

    kind: str
    role: str
    stack: str | None
    block: int | None
    branch: str | None

    @property
    def layer(self) -> str | None:
        return None if self.stack is None else f"{self.stack}.{self.block}"


def place(name: str, shape: Sequence[int]) -> Place:
    """Return the place of the tensor with this name and shape.

    >>> place("model.layers.7.self_attn.o_proj.weight", (64, 64))[1:]
    ('model.layers.*.self_attn.o_proj.weight', 'model.layers', 7, 'attention')
    >>> place("blk.7.attn_norm.weight", (64,)).kind
    'gain'
    """
    found = _BLOCK.match(name)
    # A checkpoint may contain any name, but a number with six digits is not a block.
    block = int(found[2]) if found and len(found[2]) < 6 else None
    stack = found[1] if found and block is not None else None
    kind = _kind(name, shape, block is not None)
    return Place(kind, _NUMBER.sub("*", name), stack, block, _branch(name) if kind == "matrix" else None)


def is_norm_part(name: str) -> bool:
    """Return whether the name belongs to a norm."""
    return _NORM.search(name) is not None and _NOT_NORM.search(name) is None


def _kind(name: str, shape: Sequence[int], in_block: bool) -> str:
    one_dimensional = len(shape) == 1
    if _BUFFER.search(name) and not (one_dimensional and name.endswith("attn.bias")):
        return "buffer"
    if one_dimensional and is_norm_part(name):
        return "norm bias" if _BIAS.search(name) else "gain"
    if len(shape) < 2 or _TABLE.search(name):
        return "vector"
    if not in_block and _HEAD.search(name):
        return "head"
    return "embedding" if not in_block and _EMBEDDING.search(name) else "matrix"


def _branch(name: str) -> str | None:
    if not name.endswith("bias"):
        if _ATTENTION_OUT.search(name):
            return "attention"
        if _FEED_FORWARD_OUT.search(name):
            return "feed-forward"
    return None
