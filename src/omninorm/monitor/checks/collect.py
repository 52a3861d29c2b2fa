"""Collects the facts of each step and each sample for the rules that check them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from omninorm.monitor.checks.checksum import checksum, tensors_in
from omninorm.monitor.checks.cleared import Cleared
from omninorm.monitor.checks.clipping import Clipping, totals
from omninorm.monitor.checks.facts import NoGradient, Replica, SampleChecks, Setup, Stale, StepChecks
from omninorm.monitor.checks.grids import Grids
from omninorm.monitor.checks.identity import Identity
from omninorm.monitor.checks.inputs import rms_of, sizes_of
from omninorm.monitor.checks.missing import Missing, Ran
from omninorm.monitor.checks.replicas import Replicas, are_replicated
from omninorm.monitor.checks.rounding import Rounding
from omninorm.monitor.checks.setup import SetupWatch
from omninorm.monitor.hooks.dropout import FunctionalDropout
from omninorm.monitor.hooks.hook import Hook, QuietHook
from omninorm.monitor.hooks.training_pass import in_backward, is_transformed, safely
from omninorm.monitor.model_map.structure import Structure
from omninorm.monitor.probes.gradients import Gradients
from omninorm.monitor.probes.optimizer import rates
from omninorm.monitor.stats_buffer import UNSEEN, Row, StatsBuffer


@dataclass
class _Raw:
    """What the host notes during a step."""

    without: frozenset[int] | None = None  # parameters without a gradient; None if no backward pass was seen
    absent: frozenset[int] | None = None  # trainable ones that had none at the optimizer's step either
    expected: frozenset[int] = frozenset()  # trainable parameters of the optimizers
    stepped: bool = False
    emptied: bool | None = None  # whether no optimizer found a gradient; None before the first
    rates: tuple[float, ...] = ()
    moved: bool = False
    setup: Setup = field(default_factory=Setup)


class Checks:
    """The checks of one watch.

    Args:
        named: all parameters.
        groups: each group's parameters, as indices into `named`.
        sentinels: the names of the modules that are checked in every step, and how many of them are outside the blocks.
        failed: called with a monitoring error.
        every: the steps between samples.
        done: the number of steps done before.
        scaler: the GradScaler, if there is one.
        replicas: whether all processes should have equal weights.
        dropout: the calls of F.dropout inside blocks.
    """

    def __init__(
        self,
        structure: Structure,
        named: Sequence[tuple[str, nn.Parameter]],
        groups: Mapping[str, Sequence[int]],
        sentinels: tuple[Sequence[str], int],
        buffer: StatsBuffer,
        optimizers: Sequence[torch.optim.Optimizer],
        gradients: Gradients,
        failed: Callable[[Exception], None],
        *,
        every: int = 1,
        done: int = 0,
        scaler: Any = None,
        replicas: bool = True,
        dropout: FunctionalDropout | None = None,
    ) -> None:
        self._dropout = dropout or FunctionalDropout()
        self._structure, self._groups, self._buffer, self._optimizers = structure, groups, buffer, optimizers
        self._names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._sentinels, self._outside = sentinels
        self._failed, self._scaler, self._gradients = failed, scaler, gradients
        gains = {id(norm.gain) for norm in structure.norms if norm.gain is not None}
        self._gains = [at for at, parameter in enumerate(self._parameters) if id(parameter) in gains]
        self._missing = Missing(structure, self._names, self._parameters, sentinels[0][: sentinels[1]])
        self._identity = Identity(structure.model, named, optimizers)
        self._clipping = Clipping(self._parameters, buffer.device)
        inside = {at for block in structure.blocks for at in groups.get(block.name, ())}
        self._grids = Grids(self._names, self._parameters, inside)
        self._rounding = Rounding(self._parameters)
        self._cleared = Cleared([], buffer.device)
        self._replicas = Replicas(structure.model, named, groups) if replicas and are_replicated() else None
        self._held: dict[int, frozenset[int]] = {}
        self._versions: list[int] = []
        self._passes = 0  # backward passes before the optimizer step
        self._float_inputs = True
        self._now, self._steps = _Raw(), list[_Raw]()
        self._done, self._every, self._sampled, self._samples = done, every, done, 0
        gradients.on_begin, gradients.on_end = self._backward_begins, self._backward_ends

    # Hooks ------------------------------------------------------------------------------------------------------------

    def attach(self, compiled: bool) -> list[RemovableHandle]:
        """Register hooks on the optimizers and the model's input, after those of Gradients and OptimizerWatch."""
        self._cleared = Cleared(self._gradients.first, self._buffer.device)
        model = self._structure.model
        hook = (QuietHook if compiled else Hook)(self._see_inputs, model)
        seen = self._structure.blocks or not compiled
        handles = [model.register_forward_pre_hook(hook, with_kwargs=True)] if seen else []
        self._sees_calls = bool(handles)
        inner = self._structure.blocks[0].module if self._structure.blocks else next(model.children(), None)
        self._setup = SetupWatch(
            model,
            self._parameters,
            self._scaler,
            None if compiled else inner,
            self._done > 0,
            self._dropout,
            self._failed,
        )
        handles += self._setup.attach()
        for optimizer in self._optimizers:
            before = lambda it, *_: safely(lambda: self._before_step(it), self._failed)  # noqa: E731
            after = lambda it, *_: safely(lambda: self._after_step(it), self._failed)  # noqa: E731
            handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        return handles

    def _see_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the mode of the model, and add the checksum of the inputs in some steps."""
        if is_compiling():
            return
        training = torch.is_grad_enabled()
        safely(lambda: self._setup.see_root(module, training, self._buffer.sampling), self._failed)
        if not self._structure.blocks or in_backward() or not training:
            return
        if self._float_inputs and not is_transformed():
            safely(lambda: self._see_sizes(args, kwargs), self._failed)
        if not self._is_due():
            return
        tensors = [] if is_transformed() else list(tensors_in([args, kwargs]))
        if tensors:
            safely(lambda: self._buffer.add_fact("batch", checksum(tensors)), self._failed)

    def _see_sizes(self, args: Any, kwargs: Any) -> None:
        """Measure the size of the inputs of the first forward pass of a step, if they are floating-point numbers."""
        found = sizes_of(args, kwargs)
        self._float_inputs = bool(found)
        if found and not self._buffer.has_fact("input"):
            self._buffer.add_fact("input", rms_of(found))

    def _is_due(self) -> bool:
        """Return whether the inputs of this step are checked: in sampled steps, in those after them, and in one whose
        distance changes, because data may repeat after as many steps as lie between two samples."""
        distance = self._done + 1 - self._sampled
        return self._buffer.sampling or distance in (1, 2 + self._samples % max(1, self._every - 2))

    def _backward_begins(self) -> None:
        self._cleared.backward_begins()

    def _backward_ends(self) -> None:
        self._cleared.backward_ends()
        without, now = self._gradients.without, self._now
        absent = frozenset(at for at in without if self._parameters[at].requires_grad)
        now.absent = absent if now.absent is None else now.absent & absent
        now.without = without

    def _ids(self, optimizer: torch.optim.Optimizer, renew: bool = False) -> frozenset[int]:
        """Return the ids of the optimizer's parameters, which are renewed before each of its steps."""
        if renew or id(optimizer) not in self._held:
            ids = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
            self._held[id(optimizer)] = ids
        return self._held[id(optimizer)]

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        now = self._now
        now.rates += tuple(rates(optimizer))
        held = self._ids(optimizer, renew=True)
        self._passes = self._gradients.passes
        if now.absent:
            now.absent = frozenset(at for at in now.absent if self._parameters[at].grad is None)
        if not self._gradients.ended:  # a closure may compute the gradients, so those of now mean nothing
            return
        mine = [p for p in self._parameters if id(p) in held]
        if mine and now.emptied is not False:
            now.emptied = all(p.grad is None for p in mine)
        if self._buffer.sampling:
            self._clipping.before_step(held)
            self._grids.before_step(held)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        held, now = self._ids(optimizer), self._now
        now.stepped = True
        if self._gradients.passes != self._passes:  # a closure computed other gradients than those before the step
            now.emptied = False
            self._clipping.take()
        if now.absent:
            now.expected |= self._trainable(held)
        self._cleared.stepped(held)
        if self._buffer.sampling:
            self._rounding.after_step(optimizer, held, self._done + 1)

    def _trainable(self, held: frozenset[int] | None) -> frozenset[int]:
        return frozenset(
            at for at, p in enumerate(self._parameters) if p.requires_grad and (held is None or id(p) in held)
        )

    # Steps ------------------------------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """Note the facts of this step. Call it before the buffer's row ends."""
        now, self._now = self._now, _Raw()
        now.setup = self._setup.take()
        self._steps.append(now)
        self._done += 1
        if not self._optimizers:
            self._cleared.stepped(None)
        if now.absent and not now.expected:
            held = frozenset().union(*map(self._ids, self._optimizers)) if self._optimizers else None
            now.expected = self._trainable(held)
        kept, self._cleared.kept = self._cleared.kept, None
        if kept is not None:
            self._buffer.add_fact("kept", kept)
        held = frozenset().union(*map(self._ids, self._optimizers))
        versions = [p._version for p in self._gradients.first if id(p) in held]
        now.moved = not now.stepped and len(versions) == len(self._versions) and versions != self._versions
        self._versions = versions
        if self._buffer.sampling:
            self._sampled, self._samples = self._done, self._samples + 1

    def of_steps(self, rows: Sequence[Row]) -> list[StepChecks | None]:
        """Return the facts of the steps since the last call, whose rows are given; None if an error lost some."""
        steps, self._steps = self._steps, []
        if len(steps) != len(rows):
            return [None] * len(rows)
        gone = self._identity.gone() if any(raw.absent or raw.emptied for raw in steps) else frozenset[int]()
        stale = None if all(map(self._received, steps)) else self._identity.changed()
        for raw in steps:
            raw.expected -= gone
            raw.emptied = raw.emptied and not gone
        return [self._of_step(raw, row, stale) for raw, row in zip(steps, rows, strict=True)]

    def _received(self, raw: _Raw) -> bool:
        """Return whether a parameter received a gradient."""
        return raw.without is not None and len(raw.without) < len(self._names)

    def _of_step(self, raw: _Raw, row: Row, stale: Stale | None) -> StepChecks:
        kept, received = row.facts["kept"], self._received(raw)
        return StepChecks(
            optimizer=bool(self._optimizers),
            scaler=self._scaler is not None,
            received=received,
            stepped=raw.stepped,
            emptied=bool(raw.emptied) and received,
            overflowed=self._overflowed(raw, row),
            no_gradient=(*self._no_gradient(raw, row), *self._zero_gradient(raw, row)),
            kept=kept if kept is None or 0.0 < kept < float("inf") else None,
            rates=raw.rates,
            moved=raw.moved,
            batch=row.facts["batch"],
            input=row.facts["input"],
            before_blocks=self._before_blocks(row),
            setup=raw.setup if self._sees_calls else replace(raw.setup, idle=False),
            stale=None if received else stale,
        )

    def _overflowed(self, raw: _Raw, row: Row) -> str | None:
        """Return the parameter with which scaled gradients stopped being finite; backward runs from the last one."""
        if self._scaler is None or raw.without is None:
            return None
        places = [at for at, norm in enumerate(row.gradients) if norm == UNSEEN and at not in raw.without]
        return self._names[places[-1]] if places else None

    def _no_gradient(self, raw: _Raw, row: Row) -> tuple[NoGradient, ...]:
        if not raw.absent:
            return ()
        return self._missing.find(raw.absent & raw.expected, raw.expected, self._ran(row))

    def _zero_gradient(self, raw: _Raw, row: Row) -> tuple[NoGradient, ...]:
        """Return blocks whose gradients are exactly 0 while other gradients are not."""
        if 0.0 not in row.gradients or not any(norm > 0.0 for norm in row.gradients):
            return ()
        return tuple(
            NoGradient(block.name, "zero", (block.name,), len(self._groups[block.name]))
            for block in self._structure.blocks
            if all(row.gradients[at] in (0.0, UNSEEN) for at in self._groups[block.name])
            and any(row.gradients[at] == 0.0 for at in self._groups[block.name])
        )

    def _before_blocks(self, row: Row) -> tuple[tuple[str, float], ...]:
        """Return the largest |x| of the modules that ran before the first block."""
        outside, order = self._outside, self._buffer.order
        first = min((place for at, place in order.items() if at >= outside), default=0)
        early = [at for at, place in order.items() if at < outside and place < first and row.sentinels[at] != UNSEEN]
        return tuple((self._sentinels[at], row.sentinels[at]) for at in early)

    def _ran(self, row: Row) -> Ran:
        order: dict[str, int] = {}
        for sentinel, place in self._buffer.order.items():
            if row.sentinels[sentinel] != UNSEEN:
                name = self._sentinels[sentinel]
                order[name] = min(place, order.get(name, place))
        return Ran(order)

    # Samples ----------------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, Tensor]:
        """Return the tensors of a sampled step, to be copied to the host."""
        found = self._rounding.take() | self._grids.take()
        clipped = self._clipping.take()
        sums = None if self._replicas is None else self._replicas.measure()
        extra = {"at_step": clipped, "replicas": sums, "scale": self._buffer.scale}
        return found | {name: tensor.reshape(-1) for name, tensor in extra.items() if tensor is not None}

    def of_sample(self, step: int, row: Row, numbers: dict[str, list[float]]) -> SampleChecks:
        """Return the facts of a sampled step, from its row and the numbers of `measure`, which are removed."""
        grids = self._grids.result({"grids": numbers.pop("grids", [])})
        names = ("stayed", "live", "at_step", "replicas", "scale")
        stayed, live, at_step, sums, scale = (numbers.pop(name, None) for name in names)
        lost = (
            None if stayed is None or live is None else self._rounding.result(stayed, live, self._groups, self._gains)
        )
        return SampleChecks(
            norms=totals(row.gradients, at_step),
            stale=self._identity.compare(),
            lost=lost,
            replicas=() if self._replicas is None or sums is None else self._exchange(self._replicas, step, sums),
            scale=None if scale is None else scale[0],
            grids=grids,
            zeroed=() if at_step is None else self._zeroed(row.gradients, at_step),
        )

    def _zeroed(self, before: Sequence[float], after: Sequence[float]) -> tuple[str, ...]:
        """Return the groups whose gradients became 0 after the backward pass, while others did not."""
        if not any(norm > 0.0 for norm in after):
            return ()
        had = {name: [at for at in places if before[at] > 0.0] for name, places in self._groups.items()}
        return tuple(name for name, places in had.items() if places and all(after[at] == 0.0 for at in places))

    def _exchange(self, replicas: Replicas, step: int, sums: Sequence[float]) -> tuple[Replica, ...]:
        """Compare the replicas. The store is on another machine; if it is gone, only this check is lost."""
        try:
            return replicas.exchange(step, sums)
        except Exception as error:
            self._failed(error)
            return ()
