"""Notes how training is set up in each step: modes of modules, autocast, Adam's coefficients and its state.

Everything is read on the host. Of Adam's step counts only those in host memory are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from omninorm.monitor.checks.facts import Restart, Setup
from omninorm.monitor.hooks.dropout import FunctionalDropout
from omninorm.monitor.hooks.hook import Hook
from omninorm.monitor.hooks.training_pass import in_backward, safely

# Parameters per optimizer whose step count is read.
FEW = 8
DROPOUT, BATCH_NORM = "dropout", "BatchNorm"


class Part(NamedTuple):
    """A module that behaves differently in training: its name, what differs, and its closest parent with parameters."""

    name: str
    module: nn.Module
    kind: str
    parent: nn.Module

    def is_active(self) -> bool:
        return self.kind == BATCH_NORM or any(True for _ in probabilities(self.module))

    def is_trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parent.parameters())


def probabilities(module: nn.Module) -> Iterator[float]:
    """Yield the module's dropout probabilities: that of an nn.Dropout, or a float of a module that calls F.dropout."""
    for name, value in vars(module).items():
        known = name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
        if (known or "drop" in name.lower()) and isinstance(value, float) and 0.0 < value <= 1.0:
            yield value


def parts_of(model: nn.Module) -> list[Part]:
    """Return the modules with dropout, even if its probability is 0 at first, and with running statistics."""
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        kind = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = BATCH_NORM if module.track_running_stats else None
        elif isinstance(module, nn.modules.dropout._DropoutNd) or any(True for _ in probabilities(module)):
            kind = DROPOUT
        if kind is not None:
            path = name
            while path and next(modules[path].parameters(), None) is None:
                path = path.rpartition(".")[0]
            found.append(Part(name, module, kind, modules[path]))
    return found


class SetupWatch:
    """Notes the setup of each step; `take` returns it.

    Args:
        inner: the module inside the model at whose input autocast is looked up as well; None if it is compiled.
        resumed: whether the optimizers have made steps before.
        functional: the calls of F.dropout inside blocks, which are cleared after each step.
        failed: called with a monitoring error.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        scaler: Any,
        inner: nn.Module | None,
        resumed: bool,
        functional: FunctionalDropout,
        failed: Callable[[Exception], None],
    ) -> None:
        self._parts, self._inner, self._failed = parts_of(model), inner, failed
        self._functional, self._functional_off = functional, False
        self._device, self._ids = parameters[0].device.type, {id(parameter) for parameter in parameters}
        enabled = scaler is not None and bool(getattr(scaler, "is_enabled", lambda: True)())
        # Whether a compiled model enters autocast inside its forward is unknown.
        self._scaled = (
            enabled and inner is not None and all(p.dtype == torch.float32 for p in parameters if p.is_floating_point())
        )
        self._states = States(self._ids, resumed)
        self._begin()

    def _begin(self) -> None:
        self._trained = self._inside = self._kept = self._called = False
        self._off, self._on, self._evaluated, self._proper = "", "", 0, False
        self._training_passes = 0  # without gradients
        self._autocast: bool | None = None
        self._betas: tuple[tuple[float, float], ...] = ()
        self._high: tuple[tuple[str, float], ...] = ()

    def attach(self) -> list[RemovableHandle]:
        """Register hooks on an inner module and on all optimizers, because training may create new ones."""
        handles = []
        if self._inner is not None:
            handles.append(self._inner.register_forward_pre_hook(Hook(self._see_inner, self._inner)))
        before = lambda it, *_: None if is_compiling() else safely(lambda: self._before_step(it), self._failed)  # noqa: E731
        after = lambda it, *_: None if is_compiling() else safely(lambda: self._states.after(it), self._failed)  # noqa: E731
        return [*handles, register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def see_root(self, model: nn.Module, training: bool, sampling: bool) -> None:
        """Note the mode at the beginning of the model's forward. `training`: whether gradients are enabled."""
        self._inside, self._called = False, True
        if in_backward():
            self._evaluated, self._on = 0, ""  # activation checkpointing around the whole model
            self._functional.evaluated = False
        elif training:
            self._see_training(model, sampling)
        elif model.training:
            self._training_passes += 1
            self._on = self._on or kinds(part for part in self._parts if part.module.training and part.is_active())
            self._evaluated += bool(self._on)
        else:
            self._proper = True

    def _see_training(self, model: nn.Module, sampling: bool) -> None:
        self._kept |= model.training
        self._autocast = bool(self._autocast) or autocasts(self._device)
        if not model.training and not self._trained:
            active = [part for part in self._parts if part.is_active()]
            if not any(part.module.training for part in active) and any(part.is_trainable() for part in active):
                self._off = kinds(active)
        self._trained = self._inside = True
        if sampling:
            drops = [part for part in self._parts if part.kind == DROPOUT and part.module.training]
            drops = [part for part in drops if isinstance(part.module, nn.modules.dropout._DropoutNd)]
            self._high = tuple((part.name, max(probabilities(part.module), default=0.0)) for part in drops)

    def _see_inner(self, *_: Any) -> None:
        if self._inside and not in_backward():
            self._autocast = self._autocast or autocasts(self._device)

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._states.before(optimizer):
            self._betas += tuple(betas_of(optimizer))

    def take(self) -> Setup:
        """Return the setup of the step that ends."""
        if self._functional.evaluated and not self._on:
            self._on, self._evaluated = DROPOUT, self._training_passes
        off = self._functional.is_off
        self._functional_off = not self._kept and (self._functional_off if off is None else off)
        if self._functional_off and DROPOUT not in self._off:
            self._off = f"{DROPOUT} and {BATCH_NORM}" if self._off else DROPOUT
        setup = Setup(
            trained=self._trained,
            idle=not self._called,
            off="" if self._kept else self._off,
            on=self._on,
            evaluated=self._evaluated,
            proper=self._proper,
            scaled=self._scaled,
            autocast=self._autocast,
            inside=self._inner is not None,
            betas=self._betas,
            restart=self._states.take(),
            dropout=(*self._high, *self._functional_dropout()),
        )
        self._begin()
        return setup

    def _functional_dropout(self) -> list[tuple[str, float]]:
        """Return the blocks with F.dropout, without those where an nn.Dropout has called it."""
        found = [
            (block, p)
            for block, p in self._functional.active.items()
            if not any(name.startswith(f"{block}.") and p <= known for name, known in self._high)
        ]
        self._functional.clear()
        return found


class States:
    """Follows the step counts of some parameters of all optimizers that train the model."""

    def __init__(self, ids: set[int], resumed: bool) -> None:
        self._ids, self._resumed = ids, resumed
        self._known: dict[int, tuple[weakref.ref[torch.optim.Optimizer], int]] = {}
        self._empty: list[Tensor] = []
        self._found: Restart | None = None

    def before(self, optimizer: torch.optim.Optimizer) -> bool:
        """Note which parameters have no state yet. Return whether the optimizer trains the model."""
        mine = [p for group in optimizer.param_groups for p in group["params"][:FEW] if id(p) in self._ids]
        self._empty = [p for p in mine if not optimizer.state.get(p)]
        return bool(mine)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Compare the step counts with those of the previous step."""
        empty, self._empty = {id(parameter) for parameter in self._empty}, []
        restarts, counted = list[Restart](), 0
        for parameter in (p for group in optimizer.param_groups for p in group["params"][:FEW]):
            count = count_of(optimizer, parameter) if id(parameter) in self._ids else None
            if count is None:
                continue
            counted += 1
            owner, before = self._known.get(id(parameter), (None, None))
            if count == 1 and id(parameter) in empty and (self._resumed or before is not None):
                restarts.append(Restart(before, owner is not None and owner() is not optimizer))
            self._known[id(parameter)] = weakref.ref(optimizer), count
        # A parameter that had no gradient before a resumed run has no state to restore.
        if restarts and (not self._resumed or len(restarts) == counted):
            self._found = self._found or restarts[0]
        self._resumed = self._resumed and not counted

    def take(self) -> Restart | None:
        found, self._found = self._found, None
        return found


def count_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int | None:
    """Return the number of Adam's steps if it is in host memory."""
    state = optimizer.state.get(parameter)
    step = state.get("step") if state and "exp_avg_sq" in state else None
    if isinstance(step, Tensor):
        return int(step) if step.device.type == "cpu" and step.numel() == 1 else None
    return step if isinstance(step, int) else None


def betas_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[float, float]]:
    """Yield the pairs of a variant of Adam, without those that are tensors."""
    for group in optimizer.param_groups:
        betas = group.get("betas")
        if "eps" not in group or not isinstance(betas, (tuple, list)) or len(betas) != 2:
            continue
        if all(isinstance(beta, (int, float)) for beta in betas):
            yield float(betas[0]), float(betas[1])


def kinds(parts: Iterable[Part]) -> str:
    """Return what differs in training, in words."""
    found = {part.kind for part in parts}
    return " and ".join(kind for kind in (DROPOUT, BATCH_NORM) if kind in found)


def autocasts(device: str) -> bool:
    return torch.is_autocast_enabled(device)
