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
        if in_backward() or is_transformed():
            return False
        return torch.is_grad_enabled() if self.inside is None else self.inside


def in_backward() -> bool:
    """Return whether autograd is running a backward pass in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def is_transformed() -> bool:
    """Return whether tensors cannot be measured: in inference mode, inside torch.func, and while they are traced."""
    if torch.is_inference_mode_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace would record the measurement
        return True
    modes = torch._C._len_torch_dispatch_stack()
    return modes > 0 and any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING_MODES)


def safely(work: Callable[[], None], failed: Callable[[Exception], None]) -> None:
    """Measure without a graph. A monitoring error is passed to `failed` and does not reach the training."""
    enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # as torch.no_grad does, which takes longer
    try:
        work()
    except Exception as error:
        failed(error)
    finally:
        torch._C._set_grad_enabled(enabled)
