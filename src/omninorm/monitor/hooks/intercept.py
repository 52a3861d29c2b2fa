"""Intercepts functions of torch while a watch is open: attention, softmax, dropout, cross entropy, norms and roots.

The arguments of attention are what it really uses, after position encoding, norms and scale, in any architecture. A
torch-function mode would intercept every other use of a tensor as well, and Dynamo cannot trace through one. All open
watches share one set of wrappers, which is removed with the last watch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.jit import _builtins


class Listener(NamedTuple):
    """Callbacks: `attention(query, key, mask, is_causal, scale)` and `norm(x, node, y)`, also while tracing;
    `softmax(logits, dim)`, `root(x)`, `loss(logits, labels)`, the input of cross entropy, `dropout(p, training)`,
    `choice(x, indices)` after topk or argmax, and `gradients(tensors, norms)` with the 2-norms for clipping.

    All but `dropout` and `gradients` are called only while `is_active()`, or while a graph is traced.

    `node` is the autograd node of x before the call. `norms`: whether `norm` and `root` are called at all; functional
    norms are of interest only in models some of whose blocks contain no norm module.
    """

    attention: Callable[[Tensor, Tensor, Tensor | None, bool, float | None], None]
    softmax: Callable[[Any, Any], None]
    norm: Callable[[Tensor, Any, Tensor], None]
    root: Callable[[Tensor], None]
    norms: bool = False
    loss: Callable[[Any, Any], None] | None = None
    dropout: Callable[[float, bool], None] | None = None
    choice: Callable[[Any, Any], None] | None = None
    gradients: Callable[[Any, Sequence[Tensor]], None] | None = None
    is_active: Callable[[], bool] = lambda: True


class _Wrapped(NamedTuple):
    """`ours` replaces `before` as `owner.name`. `own`: whether `before` was defined there and not in a base class."""

    owner: Any
    name: str
    before: Any
    own: bool
    ours: Any


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# Not torch.nn.functional, whose softmax calls Tensor.softmax: a model may hold that function, and pickle refuses one
# whose name leads to another. The other functions are built in, or rarely held.
_SOFTMAX = (torch, Tensor)
# Functions that normalize rows, and those from which norms are written: 1/√(mean(x²) + ε) has one element for each row.
_NORMS: tuple[tuple[Any, str], ...] = (
    (F, "rms_norm"),
    (F, "layer_norm"),
    (F, "normalize"),
    (torch, "rms_norm"),
    (torch, "layer_norm"),
)
_ROOTS: tuple[tuple[Any, str], ...] = (
    (torch, "rsqrt"),
    (Tensor, "rsqrt"),
    (torch, "sqrt"),
    (Tensor, "sqrt"),
    (Tensor, "norm"),
)
_CHOICES: tuple[tuple[Any, str], ...] = ((torch, "topk"), (Tensor, "topk"), (torch, "argmax"), (Tensor, "argmax"))
_listeners: list[Listener] = []
_wrapped: list[_Wrapped] = []
_period = 0  # wrappers from an earlier period, which other wrappers may still call, do nothing
_depth = 0  # > 0 inside softmax, because torch.nn.functional.softmax calls Tensor.softmax


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` before each attention inside the block."""
    if not _listeners:
        _wrap()
    if listener.norms and not any(each.norms for each in _listeners):
        _wrap_norms()
    if listener.choice and not any(each.name == "topk" for each in _wrapped):
        for owner, name in _CHOICES:
            _put(owner, name, _intercepted_choice)
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
        if not _listeners:
            _unwrap()


def _wrap() -> None:
    _put(F, "scaled_dot_product_attention", _intercepted_attention)
    for owner in _SOFTMAX:
        _put(owner, "softmax", _intercepted_softmax)
    _put(F, "cross_entropy", _intercepted_cross_entropy)
    _put(F, "dropout", _intercepted_dropout)
    _put(torch, "_foreach_norm", _intercepted_norms)


def _wrap_norms() -> None:
    for owner, name in _NORMS:
        _put(owner, name, _intercepted_norm)
    for owner, name in _ROOTS:
        _put(owner, name, _intercepted_root)


def _put(owner: Any, name: str, wrap: Callable[[Any, int], Any]) -> None:
    before = getattr(owner, name)  # possibly the user's replacement
    ours = _disguise(wrap(before, _period), before, owner, name)
    _wrapped.append(_Wrapped(owner, name, before, name in vars(owner), ours))
    setattr(owner, name, ours)


def _disguise(ours: Any, before: Any, owner: Any, name: str) -> Any:
    """Make a wrapper look like the function at its place to pickle, inspect and torch.jit."""
    update_wrapper(ours, before)
    ours.__module__ = "torch.nn.functional" if owner is F else "torch"
    ours.__name__, ours.__qualname__ = name, f"Tensor.{name}" if owner is Tensor else name
    operator = _builtins._find_builtin(before)  # type: ignore[no-untyped-call]
    if operator is not None:
        _builtins._register_builtin(ours, operator)
    else:
        ours.__prepare_scriptable__ = lambda: before
    return ours


def _is_idle(period: int) -> bool:
    """Return whether a wrapper only calls the original: after its watch, and where a model is exported."""
    if _period != period or torch.compiler.is_exporting():
        return True
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call,attr-defined]


def _active() -> list[Listener]:
    return [listener for listener in _listeners if listener.is_active()]


def _unwrap() -> None:
    global _period
    _period += 1
    while _wrapped:
        owner, name, before, own, ours = _wrapped.pop()
        _builtins._get_builtin_table().pop(id(ours), None)  # type: ignore[no-untyped-call]
        if vars(owner).get(name) is not ours:
            continue  # other code has replaced it since; leave that in place
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)  # uncovers the one of the base class


def _intercepted_attention(original: Any, period: int) -> Any:
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        listeners = _listeners if is_compiling() else _active()
        if not listeners or _is_idle(period):
            return original(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        if "query" in given and "key" in given:
            rest = given.get("attn_mask"), given.get("is_causal", False), given.get("scale")
            for listener in listeners:
                listener.attention(given["query"], given["key"], *rest)
        return original(*args, **kwargs)

    return scaled_dot_product_attention


def _intercepted_softmax(original: Any, period: int) -> Any:
    def softmax(*args: Any, **kwargs: Any) -> Any:
        global _depth
        listeners = () if is_compiling() or _depth else _active()
        if not listeners or _is_idle(period):
            return original(*args, **kwargs)
        _depth += 1
        try:
            logits = args[0] if args else kwargs.get("input")
            for listener in listeners:
                listener.softmax(logits, args[1] if len(args) > 1 else kwargs.get("dim"))
            return original(*args, **kwargs)
        finally:
            _depth -= 1

    return softmax


def _intercepted_cross_entropy(original: Any, period: int) -> Any:
    def cross_entropy(*args: Any, **kwargs: Any) -> Any:
        listeners = () if is_compiling() or _period != period else _active()
        logits = args[0] if args else kwargs.get("input")
        labels = args[1] if len(args) > 1 else kwargs.get("target")
        for listener in listeners:
            if listener.loss is not None:
                listener.loss(logits, labels)
        return original(*args, **kwargs)

    return cross_entropy


def _intercepted_norms(original: Any, period: int) -> Any:
    def _foreach_norm(*args: Any, **kwargs: Any) -> Any:
        norms = original(*args, **kwargs)
        # Clipping passes the tensors and the order; the monitor's own calls pass a dtype as well.
        if not is_compiling() and _period == period and len(args) == 2 and args[1] == 2 and not kwargs:
            for listener in _listeners:
                if listener.gradients is not None:
                    listener.gradients(args[0], norms)
        return norms

    return _foreach_norm


def _intercepted_dropout(original: Any, period: int) -> Any:
    def dropout(*args: Any, **kwargs: Any) -> Any:
        if not is_compiling() and not _is_idle(period):
            given = {**dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
            p, training = given.get("p", 0.5), given.get("training", True)
            for listener in _listeners:
                if listener.dropout is not None and isinstance(p, (int, float)) and isinstance(training, bool):
                    listener.dropout(float(p), training)
        return original(*args, **kwargs)

    return dropout


def _intercepted_norm(original: Any, period: int) -> Any:
    def norm(*args: Any, **kwargs: Any) -> Any:
        global _depth
        listeners = _listeners if is_compiling() else _active()
        wanted = [] if _depth or not listeners or _is_idle(period) else [each for each in listeners if each.norms]
        x = args[0] if args else kwargs.get("input")
        if not wanted or not isinstance(x, Tensor):
            return original(*args, **kwargs)
        if is_compiling():
            y = original(*args, **kwargs)
            for listener in wanted:
                listener.norm(x, None, y)
            return y
        _depth += 1  # F.rms_norm calls torch.rms_norm
        try:
            node = x.grad_fn
            y = original(*args, **kwargs)
            if isinstance(y, Tensor):
                for listener in wanted:
                    listener.norm(x, node, y)
            return y
        finally:
            _depth -= 1

    return norm


def _intercepted_root(original: Any, period: int) -> Any:
    def root(*args: Any, **kwargs: Any) -> Any:
        y = original(*args, **kwargs)
        listeners = () if is_compiling() or _depth else _active()
        if listeners and not _is_idle(period) and isinstance(y, Tensor) and y.shape[-1:] == (1,):
            for listener in listeners:
                if listener.norms:
                    listener.root(y)
        return y

    return root


def _intercepted_choice(original: Any, period: int) -> Any:
    def choice(*args: Any, **kwargs: Any) -> Any:
        y = original(*args, **kwargs)
        listeners = () if is_compiling() else _active()
        if listeners and not _is_idle(period):
            x = args[0] if args else kwargs.get("input")
            for listener in listeners:
                if listener.choice is not None:
                    listener.choice(x, y[1] if isinstance(y, tuple) else y)
        return y

    return choice
