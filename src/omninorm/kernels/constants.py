"""A decorator for functions that Dynamo calls while it traces, instead of tracing into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_in_graphs(function: _Function) -> _Function:
    """Mark a function as constant: called with constant arguments, its result becomes a constant of the graph.

    This does the same as torch.compiler.assume_constant_result, but without importing Dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
