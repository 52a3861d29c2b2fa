"""The norm of every parameter's gradient, taken when a backward pass has ended: complete, and not yet clipped."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from omninorm.kernels.distributed import is_distributed
from omninorm.watch.board import UNSEEN, Board
from omninorm.watch.gate import safely
from omninorm.watch.tensors import here, norms_of_whole

MOST_HOOKS = 8


class Pending:
    """A measurement that has been ordered. It dies with the backward pass that holds it, whether that ends or fails."""


class Gradients:
    """Watches the gradients of `parameters`, in every step.

    They are divided by a scaler's scale. What is not finite in scaled ones is not seen as long as the scale is above 1:
    the scaler skips that step and tries a smaller one.

    With gradient accumulation each backward pass overwrites what the one before it gave, so the last one's sum stays.

    Args:
        failed: told of an error of ours, which must not reach the training.
    """

    def __init__(
        self,
        board: Board,
        parameters: Sequence[nn.Parameter],
        failed: Callable[[Exception], None],
    ) -> None:
        self._board, self._parameters, self._failed = board, parameters, failed
        self._pending: weakref.ref[Pending] | None = None
        self.measured = False
        self._places: tuple[list[int], Tensor] | None = None

    def attach(self) -> list[RemovableHandle]:
        """Registers the hook that notices a backward pass."""
        learning = [parameter for parameter in self._parameters if parameter.requires_grad]
        if not learning:
            return []
        # A hook on each would cost more than the norms. Where a backward pass reaches none of these, or parameters have
        # been frozen since, `before_step` looks.
        few = learning[:: -(-len(learning) // MOST_HOOKS)] + learning[-1:]
        if any(map(is_distributed, few)):
            # FSDP2 differentiates others in their places, and calls these hooks when it has a gradient for them.
            return [p.register_post_accumulate_grad_hook(self._on_first) for p in few]  # type: ignore[no-untyped-call]
        return [register_multi_grad_hook(few, self._on_first, mode="any")]

    def _on_first(self, gradient: Tensor) -> None:
        if self._pending is None or self._pending() is None:
            pending = Pending()
            self._pending = weakref.ref(pending)
            # Twice, since DistributedDataParallel writes the averaged gradients in a callback of its own.
            _at_the_end(lambda: _at_the_end(lambda: self._measure(pending)))

    def _measure(self, pending: Pending | None = None) -> None:
        def work() -> None:
            self._board.set_gradients(self.norms())
            self.measured = True

        safely(work, self._failed)

    def norms(self) -> Tensor:
        """‖gradient‖ of every parameter, UNSEEN where there is none: (parameters,), float32."""
        device = self._board.device
        gradients = [_values(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        if gradients:
            found = norms_of_whole(stack(norms_of([here(gradient) for gradient in gradients]), device), gradients)
            scale = self._board.scale
            if scale is not None:
                scale = scale.to(device)
                found = torch.where(found.isfinite() | (scale <= 1), found / scale, UNSEEN)
            if len(gradients) == len(self._parameters):
                return found
            places = [at for at, parameter in enumerate(self._parameters) if parameter.grad is not None]
            return spread(found, self._index(places), len(self._parameters))
        return torch.full((len(self._parameters),), UNSEEN, device=device)

    def _index(self, places: list[int]) -> Tensor:
        """The places on the device. They seldom change, and each move would wait for the device."""
        if self._places is None or self._places[0] != places:
            self._places = places, torch.tensor(places, device=self._board.device)
        return self._places[1]

    def forget(self) -> None:
        """Begins a step."""
        self._pending = None
        self.measured = False

    def before_step(self) -> None:
        """Before an optimizer's step: gradients that no hook has announced, clipped if they are."""
        if not self.measured:
            self._measure()


def _at_the_end(function: Any) -> None:
    Variable._execution_engine.queue_callback(function)


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def norms_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """‖·‖₂ of each, in float32 at least, so that 16-bit tensors do not overflow.

    On a CPU, where looking waits for nothing, those that overflow float32 (from 1e19 on) are taken in float64.
    Elsewhere a finite tensor of that size counts as infinite.
    """
    tensors = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms: list[Tensor] = list(torch._foreach_norm(tensors, 2, dtype=wide))
    if wide == torch.float32 and all(tensor.is_cpu for tensor in tensors) and not torch.stack(norms).sum().isfinite():
        for at, norm in enumerate(norms):
            if not norm.isfinite():
                norms[at] = torch.linalg.vector_norm(tensors[at], dtype=torch.float64)
    return norms


def stack(scalars: Sequence[Tensor], device: torch.device) -> Tensor:
    """Numbers of any device and precision as one tensor, in float64 where there is one."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if len({(scalar.device, scalar.dtype) for scalar in scalars}) > 1:
        scalars = [scalar.to(device, dtype, non_blocking=True) for scalar in scalars]
    return torch.stack(list(scalars)).to(device, dtype, non_blocking=True)


def spread(values: Tensor, places: Tensor, count: int) -> Tensor:
    """The values at their places among `count`, UNSEEN at the others."""
    found = torch.full((count,), UNSEEN, device=values.device, dtype=values.dtype)
    found[places] = values
    return found
