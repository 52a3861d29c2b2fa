"""Hooks on blocks: modules, and lists of sublayers that are never called themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from omninorm.monitor.hooks.compiled import CompiledProbe
from omninorm.monitor.hooks.training_pass import in_backward, is_transformed
from omninorm.monitor.model_map.parts import Block
from omninorm.monitor.probes.block import BlockProbe
from omninorm.monitor.stats_buffer import StatsBuffer
from omninorm.monitor.tensors import first_argument, first_tensor, some_tensors, version_of, with_first_tensor

if TYPE_CHECKING:
    from omninorm.monitor.hooks.attach import Hooks


class Running(NamedTuple):
    """A running block: its index, its input with the version that it had, and the input's autograd node."""

    block: int
    x: Tensor | None
    version: int
    node: Any


class BlockHooks:
    """The hooks of all blocks of a model.

    A list of sublayers begins when the first of them is called. It ends when another block or a module outside the
    blocks is called, whose input is then its output.
    """

    def __init__(self, hooks: Hooks, buffer: StatsBuffer) -> None:
        self._hooks, self._buffer = hooks, buffer
        self._list: tuple[Running, BlockProbe] | None = None  # the list that is running

    def attach(self, block: Block, site: BlockProbe, attention: CompiledProbe) -> None:
        if block.parts:
            for part in block.parts:
                self._hooks.register(part, self._before_part(site), None, with_kwargs=True)
        else:
            self._on_module(block.module, site, attention)

    def _on_module(self, module: nn.Module, site: BlockProbe, attention: CompiledProbe) -> None:
        hooks, index = self._hooks, site.index
        function = hooks.norms.function_probe(index)

        def see(y: Tensor, x: Tensor | None = None) -> None:
            site.see(y, x)
            if self._buffer.sampling:
                hooks.dtype = hooks.dtype or y.dtype
                hooks.placements.graph_block(index, y, x)

        traced, tapped = hooks.trace(see), hooks.trace(site.see_gradient_if_sampled)

        def before(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            if is_compiling():
                x = first_argument(args, kwargs)
                # Probes, not indices: an index would be a constant, and each block a graph of its own.
                hooks.tracing, hooks.tracing_norms = attention, (function, None if x is None else x.shape)
            elif self._buffer.sampling and not in_backward():
                hooks.running.append(self._begin(index, first_argument(args, kwargs)))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            y = first_tensor(output)
            if is_compiling():
                hooks.tracing = hooks.tracing_norms = None
                x = first_argument(args, kwargs)
                if y is None or not torch.is_grad_enabled():
                    return None
                hooks.put(traced, y, *([] if x is None else [x]))
                return with_first_tensor(output, tapped.tap(y))
            if not self._buffer.sampling:
                hooks.peaks.see(site.sentinel, y)
                return None
            began = hooks.running.pop() if hooks.running and not in_backward() else Running(index, None, -1, None)
            if y is not None:
                if y is not output and sum(each.shape == y.shape for each in some_tensors(output)) > 1:
                    hooks.placements.has_several_outputs(index)
                self._see(site, y, began)
            return None

        hooks.register_for_samples(module, before, None)
        hooks.register_output(module, after, site.sentinel)

    def _see(self, site: BlockProbe, y: Tensor, began: Running) -> None:
        """Measure a block that has ended, and its gradient in backward."""
        hooks = self._hooks
        if hooks.gate.is_open():
            hooks.safely(lambda: self._measure(site, y, began))
        if self._buffer.sampling and y.requires_grad and not is_transformed():
            hooks.safely(lambda: self._hook_gradient(site, y))

    def _hook_gradient(self, site: BlockProbe, y: Tensor) -> None:
        hooks = self._hooks
        y.register_hook(lambda dy: hooks.safely(lambda: site.see_gradient(dy)))  # type: ignore[no-untyped-call]

    def _begin(self, index: int, x: Tensor | None) -> Running:
        """Return a block that begins with the input x, which is dropped if the forward pass does not count."""
        if x is None or not self._hooks.gate.is_open():
            return Running(index, None, -1, None)
        return Running(index, x, version_of(x), self._hooks.node_of(x))

    def _measure(self, site: BlockProbe, y: Tensor, began: Running) -> None:
        x = began.x
        overwritten = x is not None and version_of(x) != began.version
        site.see(y, None if overwritten else x)
        if self._buffer.sampling:
            self._hooks.dtype = self._hooks.dtype or y.dtype
            self._hooks.placements.block_made(site.index, y, x, began.node)
            self._hooks.attention[site.index].end(y)

    # Lists of sublayers -------------------------------------------------------------------------------------------

    def _before_part(self, site: BlockProbe) -> Any:
        def before(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            if is_compiling() or in_backward() or (self._list and self._list[0].block == site.index):
                return
            x = first_argument(args, kwargs)
            self.end(x)
            began = self._begin(site.index, x)
            self._list = began, site
            if self._buffer.sampling:
                self._hooks.running.append(began)

        return before

    def before_other(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """End the list that is running, before a module outside the blocks is called."""
        if self._list is not None and not is_compiling() and not in_backward():
            self.end(first_argument(args, kwargs))

    def end(self, y: Tensor | None) -> None:
        """End the list that is running; y is its output, if it is known."""
        if self._list is None:
            return
        (began, site), self._list = self._list, None
        if self._hooks.running and self._hooks.running[-1] is began:
            self._hooks.running.pop()
        if y is not None and began.x is not None and y.shape == began.x.shape:
            self._see(site, y, began)

    def clear(self) -> None:
        """Forget a list that has not ended."""
        self._list = None
