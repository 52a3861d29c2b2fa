"""Watching inside of torch.compile: opaque operators in the graph, which reach the sites when the graph runs.

Whether a step is sampled is asked when an operator runs, so all steps share one graph. `watch_see` writes to a tensor,
or the compiler would drop it; `watch_gradient` passes a gradient on, at the cost of a copy in every step.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.compiler import is_compiling

from omninorm.watch.gate import in_backward

_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, TracedSite] = weakref.WeakValueDictionary()


class TracedSite:
    """What an operator in a graph calls; once this object is gone, as after the watch, the operator does nothing.

    Args:
        see: takes the tensors.
        tick: a tensor of one element on the model's device.
    """

    def __init__(self, see: Callable[..., None], tick: Tensor) -> None:
        self.see, self.tick = see, tick
        self.number = next(_numbers)
        _sites[self.number] = self

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Puts the operator into the graph that is being traced."""
        torch.ops.omninorm.watch_see(list(tensors), self.tick, self.number)

    def tap(self, y: Tensor, keep: bool = False) -> Tensor:
        """y, whose gradient is seen on its way back: `see(dy)`, or `see(dy, y)` where y is kept."""
        tapped: Tensor = Tap.apply(y, self.number, keep)  # type: ignore[no-untyped-call]
        return tapped


class Tap(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, number: int, keep: bool) -> Tensor:
        ctx.number = number
        ctx.save_for_backward(*([y] if keep else []))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.omninorm.watch_gradient(dy, list(ctx.saved_tensors), ctx.number), None, None


@torch.library.custom_op("omninorm::watch_see", mutates_args=("tick",))
def _watch_see(tensors: list[Tensor], tick: Tensor, number: int) -> None:
    site = _sites.get(number)
    if site is not None and not in_backward():  # there, a forward pass is repeated
        site.see(*tensors)


@_watch_see.register_fake
def _(tensors: list[Tensor], tick: Tensor, number: int) -> None:
    return None


@torch.library.custom_op("omninorm::watch_gradient", mutates_args=())
def _watch_gradient(dy: Tensor, kept: list[Tensor], number: int) -> Tensor:
    site = _sites.get(number)
    if site is not None:
        site.see(dy, *kept)
    return dy.clone()


@_watch_gradient.register_fake
def _(dy: Tensor, kept: list[Tensor], number: int) -> Tensor:
    return torch.empty_like(dy)


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is run by torch.compile."""
    return any(
        isinstance(getattr(module, "_orig_mod", None), nn.Module)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def attention_wrapper(see: Callable[[Tensor, Tensor, Tensor | None, bool, float | None], None]) -> Iterator[None]:
    """Inside, graphs that are traced call `see` at every scaled_dot_product_attention.

    Dynamo can't trace through a torch-function mode, so the function in torch.nn.functional is replaced for this while.
    """
    original = F.scaled_dot_product_attention

    def wrapped(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_compiling():
            see(query, key, attn_mask, is_causal, scale)
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    F.scaled_dot_product_attention = wrapped
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
