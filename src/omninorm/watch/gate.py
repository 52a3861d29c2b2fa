"""The gate: what belongs to the training step that is being watched; and that nothing of ours gets out into it."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Gate:
    """Open in a forward pass that will be differentiated; closed in evaluations, and in the forward passes that
    activation checkpointing repeats during backward, which would count twice.

    Inside the model's own forward it holds what was true at its beginning: reentrant checkpointing turns gradients off
    for its first pass.
    """

    def __init__(self) -> None:
        self.inside: bool | None = None

    def is_open(self) -> bool:
        if in_backward():
            return False
        return torch.is_grad_enabled() if self.inside is None else self.inside


def in_backward() -> bool:
    """Whether autograd's engine is running a backward pass in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def safely(work: Callable[[], None], failed: Callable[[Exception], None]) -> None:
    """Measures without a graph. An error of ours is told to `failed` and does not reach the training."""
    try:
        with torch.no_grad():
            work()
    except Exception as error:
        failed(error)
