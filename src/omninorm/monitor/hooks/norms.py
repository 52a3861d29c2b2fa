"""Hooks on norm modules, and the interception of norms that are written as functions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from omninorm.kernels import probe
from omninorm.layers.recognize import gate_of, place_of
from omninorm.monitor.hooks.compiled import CompiledProbe
from omninorm.monitor.hooks.training_pass import in_backward
from omninorm.monitor.model_map.norms import Norm
from omninorm.monitor.model_map.residual import Node
from omninorm.monitor.model_map.structure import Structure
from omninorm.monitor.probes.norm import NormCall, NormProbe, hook_examples
from omninorm.monitor.stats_buffer import StatsBuffer
from omninorm.monitor.tensors import first_argument

if TYPE_CHECKING:
    from omninorm.monitor.hooks.attach import Hooks

# A norm that is running: its input, the input's autograd node, its gate, and the call if it is omninorm's.
Call = tuple[Tensor, Any, Tensor | None, NormCall | None]


class NormHooks:
    """The hooks of all norms of a model."""

    def __init__(self, hooks: Hooks, structure: Structure, buffer: StatsBuffer) -> None:
        self._hooks, self._buffer = hooks, buffer
        self._calls: list[list[Call]] = []
        with_norms = {norm.facts.block for norm in structure.norms}
        self._without = set(range(len(structure.blocks))) - with_norms

    @property
    def are_missing(self) -> bool:
        """Whether a block contains no norm module, so that functional norms are of interest."""
        return bool(self._without)

    def clear(self) -> None:
        """Clear what an exception in a forward pass may have left."""
        for calls in self._calls:
            calls.clear()
        probe.current = None

    def attach(self, norm: Norm, site: NormProbe) -> None:
        calls: list[Call] = []
        self._calls.append(calls)
        hooks, block, gate = self._hooks, norm.facts.block, _Gate(norm)

        def see(x: Tensor, y: Tensor | None = None, of_gate: Tensor | None = None) -> None:
            site.see_if_sampled(x, of_gate)
            if self._buffer.sampling and block is not None and y is not None:
                hooks.placements.graph_norm(block, x, y)

        traced, tapped = hooks.trace(see), hooks.trace(site.see_output_if_sampled)

        def before(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            if is_compiling() or not self._buffer.sampling:
                return
            counts = hooks.gate.is_open()
            x = first_argument(args, kwargs) if counts or in_backward() else None
            if x is None:
                return
            node = hooks.node_of(x) if block is not None and hooks.placements.seeks(block) else None
            if type(x) is Tensor:
                begin(x, node, gate.of(args, kwargs), counts)
            else:
                hooks.safely(lambda: begin(x, node, gate.of(args, kwargs), counts))

        def begin(x: Tensor, node: Node, of_gate: Tensor | None, counts: bool) -> None:
            call = NormCall(site, x.shape, counts, hooks.safely) if norm.facts.ours else None
            probe.current = call
            calls[:] = [(x, node, of_gate, call)]  # one that is still there ended in an exception

        def after(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
            if is_compiling():
                tensors = first_argument(args, kwargs), output, gate.of(args, kwargs)
                if tensors[0] is not None:
                    hooks.put(traced, *itertools.takewhile(lambda each: isinstance(each, Tensor), tensors))
                # The same for all norms, chosen or not, because blocks with other graphs would be compiled separately.
                grown = isinstance(output, Tensor) and torch.is_grad_enabled() and norm.facts.ours and site.trainable
                return tapped.tap(output, keep=True) if grown else None
            if calls:
                probe.current = None
                self._end(norm, site, calls.pop(), output)
            return None

        hooks.register_for_samples(norm.module, before, after)

    def _end(self, norm: Norm, site: NormProbe, running: Call, output: Any) -> None:
        """Measure a norm that has returned."""
        x, node, gate, call = running
        if not isinstance(output, Tensor):
            return
        hooks, block, is_open = self._hooks, norm.facts.block, self._hooks.gate.is_open()
        if call is None or not call.reached:
            if is_open:
                hooks.safely(lambda: site.see(x, gate))
            hooks.safely(lambda: hook_examples(site, output, hooks.safely))
        if block is not None and is_open:
            outer = hooks.running[-1].x if hooks.running else None
            hooks.safely(lambda: hooks.placements.norm_called(block, x, output, outer, node))

    # Functional norms ---------------------------------------------------------------------------------------------

    def function(self, x: Tensor, node: Any, y: Tensor) -> None:
        """Record a functional norm of the stream in a block that contains no norm module."""
        if is_compiling():
            traced, shape = self._hooks.tracing_norms or (None, None)
            if traced is not None and x.shape == shape and torch.is_grad_enabled():
                traced.put([x, y])
            return
        running, hooks = self._running(), self._hooks
        if running is not None and running[1] is not None:
            block, outer, before = *running, hooks.node_of(x) if node is None else node
            hooks.safely(lambda: self._see_function(block, x, y, outer, before))

    def _see_function(self, block: int, x: Tensor, y: Tensor, outer: Tensor | None, before: Node) -> None:
        if outer is not None and x.shape == outer.shape:
            self._hooks.placements.norm_called(block, x, y, outer, before)

    def root(self, y: Tensor) -> None:
        """Record a root with one element for each row of the stream."""
        running = self._running()
        if running is not None and running[1] is not None:
            block, outer = running
            self._hooks.safely(lambda: self._see_root(block, y, outer))

    def _see_root(self, block: int, y: Tensor, outer: Tensor | None) -> None:
        if outer is not None and y.shape[:-1] == outer.shape[:-1]:
            self._hooks.placements.inlined(block)

    def function_probe(self, block: int) -> CompiledProbe | None:
        """Return the probe that a compiled graph calls for a functional norm; None if the block has norm modules."""
        if block not in self._without:
            return None
        placements, buffer = self._hooks.placements, self._buffer

        def see(x: Tensor, y: Tensor) -> None:
            if buffer.sampling:
                placements.graph_norm(block, x, y)

        return self._hooks.trace(see)

    def _running(self) -> tuple[int, Tensor | None] | None:
        """Return the index and input of the running block, if it contains no norm module and is measured."""
        hooks = self._hooks
        if not self._buffer.sampling or not hooks.running or not hooks.gate.is_open() or not hooks.is_own_thread():
            return None
        running = hooks.running[-1]
        return (running.block, running.x) if running.block in self._without else None


class _Gate:
    """Finds the gate among the arguments of a norm's forward."""

    def __init__(self, norm: Norm) -> None:
        self._name, self._place = gate_of(norm.module) if norm.form.gate else None, 0
        if self._name is not None:
            self._place = place_of(norm.module, self._name)

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        if self._name is None:
            return None
        found = kwargs.get(self._name, args[self._place] if len(args) > self._place else None)
        return found if isinstance(found, Tensor) else None
