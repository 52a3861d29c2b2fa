"""Watching inside of torch.compile: opaque operators in the graph, which reach the sites when the graph runs.

Whether a step is sampled is asked when an operator runs, so all steps share one graph. `watch_see` pretends to write
to a tensor, or the compiler would drop it; `watch_gradient` passes a gradient on, at the cost of a copy in every step.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from omninorm.watch.gate import in_backward

_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, TracedSite] = weakref.WeakValueDictionary()


class TracedSite:
    """What an operator in a graph calls; once this object is gone, as after the watch, the operator does nothing.

    Args:
        see: takes the tensors.

    Its number is in a tensor, an input of the graph: as a constant it would make each block's graph one of its own.
    """

    def __init__(self, see: Callable[..., None]) -> None:
        self.see = see
        number = next(_numbers)
        self.number = torch.tensor([number])
        _sites[number] = self

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Puts the operator into the graph that is being traced."""
        torch.ops.omninorm.watch_see(list(tensors), self.number)

    def tap(self, y: Tensor, keep: bool = False) -> Tensor:
        """y, whose gradient is seen on its way back: `see(dy)`, or `see(dy, y)` where y is kept."""
        tapped: Tensor = Tap.apply(y, self.number, keep)  # type: ignore[no-untyped-call]
        return tapped


class Tap(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, number: Tensor, keep: bool) -> Tensor:
        ctx.save_for_backward(number, *([y] if keep else []))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        number, *kept = ctx.saved_tensors
        return torch.ops.omninorm.watch_gradient(dy, kept, number), None, None


@torch.library.custom_op("omninorm::watch_see", mutates_args=("number",))
def _watch_see(tensors: list[Tensor], number: Tensor) -> None:
    site = _sites.get(int(number))
    if site is not None and not in_backward():  # there, a forward pass is repeated
        site.see(*tensors)


@_watch_see.register_fake
def _(tensors: list[Tensor], number: Tensor) -> None:
    return None


@torch.library.custom_op("omninorm::watch_gradient", mutates_args=())
def _watch_gradient(dy: Tensor, kept: list[Tensor], number: Tensor) -> Tensor:
    site = _sites.get(int(number))
    if site is not None:
        site.see(dy, *kept)
    return dy.clone()


@_watch_gradient.register_fake
def _(dy: Tensor, kept: list[Tensor], number: Tensor) -> Tensor:
    return torch.empty_like(dy)


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is run by torch.compile."""
    return any(
        isinstance(getattr(module, "_orig_mod", None), nn.Module)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
