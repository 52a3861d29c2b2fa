"""The tensors in what modules take and return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def some_tensors(value: object) -> Iterator[Tensor]:
    """The floating-point tensors of at least two dimensions in a module's arguments or output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim >= 2:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from some_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from some_tensors(item)


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of two dimensions or more in a module's arguments or output."""
    return next(some_tensors(value), None)


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """The output with `tensor` in the place of its first; None, for no change, where it is no tensor or tuple."""
    if isinstance(output, Tensor):
        return tensor
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (tensor, *output[1:])
    return None


def find_logits(output: Any, vocabularies: set[int]) -> Tensor | None:
    """The logits in a model's output: its attribute or item "logits", or a tensor as wide as a vocabulary."""
    named = None
    if not isinstance(output, Tensor):
        named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(named, Tensor) and named.is_floating_point() and named.ndim >= 2:
        return named
    first = first_tensor(output)
    return first if first is not None and first.shape[-1] in vocabularies else None
