"""Monitoring under torch.compile: opaque operators in the graph, which call the probes when the graph runs.

Whether a step is sampled is decided when an operator runs, so all steps share one graph. `watch_see` claims to mutate a
tensor, because the compiler would remove it otherwise; `watch_gradient` passes a gradient on, with a copy in each step.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from omninorm.monitor.hooks.training_pass import in_backward

_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, CompiledProbe] = weakref.WeakValueDictionary()


class CompiledProbe:
    """The probe that an operator in a graph calls. After its deletion, when the watch closes, the operator is a no-op.

    Args:
        see: called with the tensors.

    Its number is a tensor, an input of the graph: a constant would require a separate graph for each block.
    """

    def __init__(self, see: Callable[..., None]) -> None:
        self.see = see
        number = next(_numbers)
        self.number = torch.tensor([number])
        _sites[number] = self

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Put the operator into the graph that is being traced."""
        torch.ops.omninorm.watch_see(list(tensors), self.number)

    def tap(self, y: Tensor, keep: bool = False) -> Tensor:
        """Return y, and call `see(dy)` with its gradient in backward, or `see(dy, y)` if y is kept."""
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
    if site is not None and not in_backward():  # in backward, checkpointing repeats a forward pass
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
    """Return whether torch.compile runs the model or a part of it."""
    return any(
        isinstance(getattr(module, "_orig_mod", None), nn.Module)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
