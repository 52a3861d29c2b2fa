"""Detects gradients that are not cleared between two optimizer steps."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omninorm.kernels.distributed import is_distributed
from omninorm.monitor.probes.elements import EVERY_STEP, some
from omninorm.monitor.probes.gradients import norms_of
from omninorm.monitor.tensors import stack


@dataclass
class _Tracked:
    """A parameter: its gradient as last seen, whether it has been cleared since the optimizer's last step, and whether
    a backward pass has begun since."""

    parameter: nn.Parameter
    gradient: weakref.ref[Tensor] | None = None
    version: int = 0
    stepped: bool = False
    cleared: bool = False
    begun: bool = False

    def is_untouched(self) -> bool:
        """Return whether the gradient is the same tensor as before and nothing has been written to it."""
        gradient = self.parameter.grad
        return (
            gradient is not None
            and self.gradient is not None
            and self.gradient() is gradient
            and gradient._version == self.version
        )

    def look(self) -> None:
        gradient = self.parameter.grad
        self.gradient = None if gradient is None else weakref.ref(gradient)
        self.version = 0 if gradient is None else gradient._version


class Cleared:
    """Watches a few parameters from one optimizer step to the next.

    A gradient has not been cleared if, at the first backward pass after an optimizer step, it is the same tensor with
    the same version as after that step. It counts only if the next optimizer step uses it: another part of the model
    may have been trained in between, as in a GAN. Writes to `grad.data` do not change the version, so the values are
    read as well, in such a case only.

    Args:
        parameters: some parameters whose gradients begin a backward pass, in the sense of `register_multi_grad_hook`.
        device: the device of the measurements.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._tracked = [_Tracked(parameter) for parameter in parameters if not is_distributed(parameter)]
        self._device = device
        self._norm: Tensor | None = None
        self.kept: Tensor | None = None

    def backward_begins(self) -> None:
        """Compare the gradients with those after the last event, before this backward pass adds to them."""
        kept = []
        for each in self._tracked:
            each.cleared = each.cleared or not each.is_untouched()
            if not each.cleared and not each.begun and each.stepped and each.parameter.grad is not None:
                kept.append(each.parameter.grad)
            each.begun = True
        dense = [some(gradient, EVERY_STEP) for gradient in kept if not gradient.is_sparse]
        if dense:
            self._norm = stack(norms_of(dense), self._device).norm()

    def backward_ends(self) -> None:
        for each in self._tracked:
            each.look()

    def stepped(self, held: Collection[int] | None) -> None:
        """End an interval of the parameters with these ids; None for all. Set `kept` if they were not cleared."""
        for each in self._tracked:
            if held is not None and id(each.parameter) not in held:
                continue
            if each.begun and each.stepped and not each.cleared:
                self.kept = self._norm
            each.stepped, each.cleared, each.begun = True, False, False
            each.look()
