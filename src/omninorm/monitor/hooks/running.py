"""Hooks, and what is running: blocks whose forward has begun and not ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Running(NamedTuple):
    """A running block: its index, its input with the version that it had, and the input's autograd node."""

    block: int
    x: Tensor | None
    version: int
    node: Any


class Hook:
    """A monitoring hook. In a copied or pickled model it does nothing, because that model is not monitored."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (do_nothing,)


class QuietHook(Hook):
    """A hook that torch.compile leaves out of its graphs."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def do_nothing(*args: Any) -> None:
    """Do nothing; unpickled hooks call this."""
