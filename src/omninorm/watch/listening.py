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


class _Wrapped(NamedTuple):
    """`ours` stands as `owner.name` in the place of `before`; `own`: which stood there itself, not in a base class."""

    owner: Any
    name: str
    before: Any
    own: bool
    ours: Any


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_SOFTMAX = (torch, F, Tensor)
_ears: list[Ear] = []
_wrapped: list[_Wrapped] = []
_period = 0  # wrappers of an earlier one, which somebody else's may still call, are deaf
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
    _put(F, "scaled_dot_product_attention", _heard_attention)
    for owner in _SOFTMAX:
        _put(owner, "softmax", _heard_softmax)


def _put(owner: Any, name: str, heard: Callable[[Any, int], Any]) -> None:
    before = getattr(owner, name)  # the user's own, where there is one
    ours = heard(before, _period)
    _wrapped.append(_Wrapped(owner, name, before, name in vars(owner), ours))
    setattr(owner, name, ours)


def _unwrap() -> None:
    global _period
    _period += 1
    while _wrapped:
        owner, name, before, own, ours = _wrapped.pop()
        if vars(owner).get(name) is not ours:
            continue  # somebody has put another in its place, which stays
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)  # which uncovers the one of its base class


def _heard_attention(original: Any, period: int) -> Any:
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        if _period == period and "query" in given and "key" in given:
            rest = given.get("attn_mask"), given.get("is_causal", False), given.get("scale")
            for ear in _ears:
                ear.attention(given["query"], given["key"], *rest)
        return original(*args, **kwargs)

    return scaled_dot_product_attention


def _heard_softmax(original: Any, period: int) -> Any:
    def softmax(*args: Any, **kwargs: Any) -> Any:
        global _depth
        if is_compiling() or _depth or _period != period:
            return original(*args, **kwargs)
        _depth += 1
        try:
            logits = args[0] if args else kwargs.get("input")
            for ear in _ears:
                ear.softmax(logits, args[1] if len(args) > 1 else kwargs.get("dim"))
            return original(*args, **kwargs)
        finally:
            _depth -= 1

    return softmax
