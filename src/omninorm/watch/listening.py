"""Attention is heard where it is computed: scaled_dot_product_attention and softmax, wrapped while a watch is open.

What they get is what attention really uses, with position, norms and scale applied, whatever the architecture. A
torch-function mode would hear the same and every other use of a tensor, and Dynamo can't trace through one. The
wrappers are there once for all open watches, and gone with the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling


class Ear(NamedTuple):
    """Who listens: `attention(query, key, mask, is_causal, scale)`, in graphs too, and `softmax(logits, dim)`."""

    attention: Callable[[Tensor, Tensor, Tensor | None, bool, float | None], None]
    softmax: Callable[[Any, Any], None]


_SDPA = F.scaled_dot_product_attention
_SOFTMAX = (("softmax", torch), ("softmax", F), ("softmax", Tensor))
_ears: list[Ear] = []
_depth = 0  # the softmax of torch.nn.functional calls that of Tensor


@contextmanager
def listening(ear: Ear) -> Iterator[None]:
    """Inside, every attention is told to `ear` before it is computed."""
    if not _ears:
        _wrap()
    _ears.append(ear)
    try:
        yield
    finally:
        _ears.remove(ear)
        if not _ears:
            _unwrap()


def _wrap() -> None:
    F.scaled_dot_product_attention = _heard_attention
    for name, owner in _SOFTMAX:
        setattr(owner, name, _heard_softmax(getattr(owner, name)))


def _unwrap() -> None:
    F.scaled_dot_product_attention = _SDPA
    torch.softmax, F.softmax = torch.softmax.__wrapped__, F.softmax.__wrapped__  # type: ignore[attr-defined]
    del Tensor.softmax  # which uncovers the one of its base class


def _heard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    for ear in _ears:
        ear.attention(query, key, attn_mask, is_causal, scale)
    return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _heard_softmax(original: Any) -> Any:
    def softmax(*args: Any, **kwargs: Any) -> Any:
        global _depth
        if is_compiling() or _depth:
            return original(*args, **kwargs)
        _depth += 1
        try:
            logits = args[0] if args else kwargs.get("input")
            for ear in _ears:
                ear.softmax(logits, args[1] if len(args) > 1 else kwargs.get("dim"))
            return original(*args, **kwargs)
        finally:
            _depth -= 1

    softmax.__wrapped__ = original  # type: ignore[attr-defined]
    return softmax
