"""Norms of all parameters' gradients, measured at the end of a backward pass: complete and not yet clipped."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from omninorm.kernels.distributed import is_distributed
from omninorm.monitor.hooks.training_pass import safely
from omninorm.monitor.stats_buffer import UNSEEN, StatsBuffer, fill
from omninorm.monitor.tensors import here, norms_of_whole, stack, widest

MOST_HOOKS = 8
_USUAL = frozenset([torch.float32, torch.bfloat16, torch.float16])


class Pending:
    """Marks a queued measurement. Its lifetime is that of the backward pass, whether it succeeds or fails."""


class Gradients:
    """Measures the gradients of `parameters` in every step.

    They are divided by the scale of a GradScaler. Scaled gradients that are not finite are ignored while the scale is
    above 1, because the scaler skips that step and reduces the scale.

    With gradient accumulation each backward pass overwrites the previous result, so the last, complete sum remains.

    PyTorch computes the same norms when it clips gradients. If it did so in the last sampled step, with all gradients
    and before anything else wrote to them, unsampled steps take its norms, instead of reading all gradients twice.

    Args:
        failed: called with a monitoring error, which must not reach the training.
    """

    def __init__(
        self,
        buffer: StatsBuffer,
        parameters: Sequence[nn.Parameter],
        failed: Callable[[Exception], None],
    ) -> None:
        self._buffer, self._parameters, self._failed = buffer, parameters, failed
        self._pending: weakref.ref[Pending] | None = None
        self._lock = threading.Lock()  # each device has its own backward thread
        self.measured = False
        self.passes = 0  # backward passes in this step
        self.ended = 0  # those that have ended
        self._clips = False  # whether the norms are taken from PyTorch's clipping
        self._versions: list[int] | None = None  # of the gradients after a backward pass, until they are clipped
        self._due = False  # whether the norms of a backward pass are not known yet
        self.may_wait = False  # whether `before_step` will be called
        self.first: list[nn.Parameter] = []  # those whose hooks detect a backward pass
        self.without: frozenset[int] = frozenset()  # parameters without a gradient at the last measurement
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks that detect a backward pass."""
        learning = [parameter for parameter in self._parameters if parameter.requires_grad]
        if not learning:
            return []
        # A hook on every parameter would cost more than the norms. If a backward pass reaches none of these, or they
        # have been frozen since, `before_step` measures instead.
        few = learning[:: -(-len(learning) // MOST_HOOKS)] + learning[-1:]
        self.first += few
        if any(map(is_distributed, few)):
            # FSDP2 differentiates other tensors instead, and calls these hooks when the gradients are ready.
            return [p.register_post_accumulate_grad_hook(self._on_first) for p in few]  # type: ignore[no-untyped-call]
        # register_multi_grad_hook would keep an entry for every backward pass of the run.
        return [p.register_hook(self._on_first) for p in few]  # type: ignore[no-untyped-call]

    def _on_first(self, gradient: Tensor) -> None:
        if is_compiling():  # compiled autograd traces this hook and cannot queue a callback; `before_step` measures
            return
        with self._lock:
            if self._pending is not None and self._pending() is not None:
                return
            pending = Pending()
            self._pending = weakref.ref(pending)
        safely(self.on_begin, self._failed)
        self.passes += 1
        # Queued twice, because DistributedDataParallel writes the averaged gradients in a callback as well.
        _at_the_end(lambda: _at_the_end(lambda: self._measure(pending)))

    def _measure(self, pending: Pending | None = None) -> None:
        safely(self._buffer.measure, self._failed)  # before a GradScaler changes its scale

        def work() -> None:
            self._due = pending is not None and self._clips and self.may_wait
            if self._due:
                self._find_missing()
            else:
                self._buffer.set_gradients(self.norms())
            self.measured = True
            self._versions = self._gradient_versions() if pending and (self._due or self._may_be_clipped()) else None
            self.ended += pending is not None
            self.on_end()

        safely(work, self._failed)

    def norms(self) -> Tensor:
        """Return ‖gradient‖ of every parameter, UNSEEN where there is none: (parameters,), float32."""
        device = self._buffer.device
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._find_missing()
        if gradients:
            found = _norms_of_gradients(gradients, device)
            scale = self._buffer.scale
            if scale is not None:
                scale = scale.to(device)
                found = torch.where(found.isfinite() | (scale <= 1), found / scale, UNSEEN)
            return self._at_places(found)
        return torch.full((len(self._parameters),), UNSEEN, device=device, dtype=torch.float32)

    def _at_places(self, found: Tensor) -> Tensor:
        """Return the norms of the gradients at the places of their parameters, and UNSEEN at the others."""
        if not self.without:
            return found
        # Without an index, which would have to be copied to the device whenever other parameters have a gradient.
        known, unseen = iter(found.unbind()), fill(UNSEEN, found.device, found.dtype)
        every = range(len(self._parameters))
        return torch.stack([unseen if at in self.without else next(known) for at in every])

    def _find_missing(self) -> None:
        self.without = frozenset(at for at, parameter in enumerate(self._parameters) if parameter.grad is None)

    # Norms that PyTorch computes ----------------------------------------------------------------------------------

    def _may_be_clipped(self) -> bool:
        """Return whether this sampled step's gradients are of one kind, which PyTorch clips together."""
        if not self._buffer.sampling or self._buffer.scale is not None:
            return False
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        kinds = {(type(each), each.device, each.dtype, each.layout) for each in gradients}
        kind, _, dtype, layout = next(iter(kinds), (None, None, None, None))
        return (
            len(kinds) == 1 and kind is Tensor and layout == torch.strided and dtype in (torch.float32, torch.float64)
        )

    def _gradient_versions(self) -> list[int]:
        """Return how often each gradient has been written."""
        return [parameter.grad._version for parameter in self._parameters if parameter.grad is not None]

    def see_norms(self, tensors: Any, norms: Sequence[Tensor]) -> None:
        """Take the 2-norms of tensors, if they are all gradients as the backward pass left them."""
        safely(lambda: self._see_norms(tensors, norms), self._failed)

    def _see_norms(self, tensors: Any, norms: Sequence[Tensor]) -> None:
        versions, self._versions = self._versions, None
        if versions is None or len(tensors) != len(versions):
            return
        gradients = (parameter.grad for parameter in self._parameters if parameter.grad is not None)
        for mine, tensor, version in zip(gradients, tensors, versions, strict=False):
            if mine is not tensor or tensor._version != version:
                return
        if self._buffer.sampling:
            self._clips = True
        elif self._due:
            self._due = False
            found = torch.stack(list(norms)).to(self._buffer.device)
            # If one has overflowed, `norms` computes it in float64.
            overflows = found.is_cpu and not math.isfinite(found.sum().item())
            self._buffer.set_gradients(self.norms() if overflows else self._at_places(found))

    def end_step(self) -> None:
        """Measure what PyTorch was expected to compute, but has not."""
        if self._due:
            self._clips = False
            self._measure()

    def forget(self) -> None:
        """Reset for a new step."""
        self._pending = self._versions = None
        self._clips = self._clips and not self._buffer.sampling
        self.measured = self._due = False
        self.passes = self.ended = 0

    def before_step(self) -> None:
        """Measure before an optimizer step if no hook has fired, or if a gradient was written since then: the hooks
        also fire in `torch.autograd.grad`. The gradients may be clipped already."""
        if self._due or not self.measured or any(self._parameters[at].grad is not None for at in self.without):
            self._clips = self._clips and not self._due
            self._measure()


def _at_the_end(function: Any) -> None:
    Variable._execution_engine.queue_callback(function)


def _norms_of_gradients(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    if all(map(_is_usual, gradients)):
        return stacked_norms(gradients, device, usual=True)
    values = [_values(gradient) for gradient in gradients]
    return norms_of_whole(stacked_norms([here(each) for each in values], device), values)


def _is_usual(x: Tensor) -> bool:
    """Return whether a tensor is plain, dense and real, with 16 or 32 bits."""
    return type(x) is Tensor and x.dtype in _USUAL and x.layout is torch.strided


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def norms_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return ‖·‖₂ of each tensor, in float32 or wider, so that 16-bit tensors do not overflow.

    On a CPU, where checking costs no synchronization, norms that overflow float32 (from 1e19 on) are computed in
    float64. On other devices such a tensor counts as infinite.
    """
    norms, together = _norms(tensors, usual=all(map(_is_usual, tensors)))
    return norms if together is None else together.unbind()


def stacked_norms(tensors: Sequence[Tensor], device: torch.device, usual: bool = False) -> Tensor:
    """Return the norms of `norms_of` as one tensor, in float64 where the device supports it.

    Args:
        usual: whether the tensors are known to be plain, dense and real, with 16 or 32 bits.
    """
    norms, together = _norms(tensors, usual or all(map(_is_usual, tensors)))
    return stack(norms, device) if together is None else together.to(device, widest(device))


def _norms(tensors: Sequence[Tensor], usual: bool) -> tuple[list[Tensor], Tensor | None]:
    """Return the norms; those of tensors on one device also as one tensor."""
    wide = torch.float32
    if not usual:
        tensors = [torch.view_as_real(tensor) if tensor.is_complex() else widened(tensor) for tensor in tensors]
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms: list[Tensor] = list(torch._foreach_norm(list(tensors), 2, dtype=wide))
    devices = {norm.device for norm in norms}
    if len(devices) > 1:
        return norms, None
    together = torch.stack(norms)
    if not together.is_cpu or wide == torch.float64 or math.isfinite(together.sum().item()):
        return norms, together
    again = [
        norm if norm.isfinite() else torch.linalg.vector_norm(tensors[at], dtype=torch.float64)
        for at, norm in enumerate(norms)
    ]
    return again, torch.stack([norm.double() for norm in again])


def widened(x: Tensor) -> Tensor:
    """Return 8-bit floats, with which hardly any operator works, as float32; other tensors unchanged."""
    return x.float() if x.is_floating_point() and x.element_size() == 1 else x


def spread(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Scatter the values to their places among `count`, with UNSEEN at the others."""
    found = torch.full((count,), UNSEEN, device=values.device, dtype=values.dtype)
    found[places] = values
    return found
