"""Functions that Dynamo calls while it traces, instead of tracing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_in_graphs(function: _Function) -> _Function:
    """Mark a function whose result is a constant of the graph, for arguments that are constants.

    As torch.compiler.assume_constant_result, which would import Dynamo: that takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
