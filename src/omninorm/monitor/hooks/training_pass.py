"""Decides whether a forward pass counts as training, and shields training from monitoring errors."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Gate:
    """Open in a forward pass that will be differentiated. Closed in evaluations, and in the forward passes that
    activation checkpointing repeats during backward, which would be counted twice.

    Inside the model's forward the state at its beginning applies, because reentrant checkpointing disables gradients
    in its first pass.
    """

    def __init__(self) -> None:
        self.inside: bool | None = None

    def is_open(self) -> bool:
        if in_backward():
            return False
        return torch.is_grad_enabled() if self.inside is None else self.inside


def in_backward() -> bool:
    """Return whether autograd is running a backward pass in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def safely(work: Callable[[], None], failed: Callable[[Exception], None]) -> None:
    """Measure without a graph. A monitoring error is passed to `failed` and does not reach the training."""
    try:
        with torch.no_grad():
            work()
    except Exception as error:
        failed(error)
