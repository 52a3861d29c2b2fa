"""Registers forward and backward hooks on the model and removes them together.

In eager mode a hook checks the gate and calls its probe. Under torch.compile it puts one opaque operator into the
graph, which does the same when the graph runs (see `traced`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from omninorm.kernels import probe
from omninorm.monitor.hooks.compiled import CompiledProbe
from omninorm.monitor.hooks.intercept import Listener, listening
from omninorm.monitor.hooks.training_pass import Gate, in_backward, safely
from omninorm.monitor.model_map.norms import Norm
from omninorm.monitor.model_map.placement import Placements
from omninorm.monitor.model_map.structure import Block, Structure
from omninorm.monitor.probes.attention import UNKNOWN, AttentionProbe, see_multihead
from omninorm.monitor.probes.block import BlockProbe, LogitsProbe, Sentinel, WriterProbe
from omninorm.monitor.probes.norm import NormCall, NormProbe, hook_examples
from omninorm.monitor.stats_buffer import StatsBuffer
from omninorm.monitor.tensors import find_logits, first_tensor, with_first_tensor

# The number of modules outside the blocks whose outputs are checked for NaNs.
MOST_LEAVES = 64

BLOCK_CELLS = (
    "stream_ms",
    "stream_max",
    "stream_median",
    "input_ms",
    "difference_ms",
    "angle",
    "attention_ms",
    "feed_forward_ms",
    "stream_grad_ms",
    "attention_logit",
    "attention_entropy",
    "dead_units",
)
NORM_CELLS = ("norm_ms", "eps_share", "mean_share", "saturation", "noise_small", "noise_big", "examples")
RUN_CELLS = ("logz", "logz_mean")


def cell_sizes(structure: Structure) -> dict[str, int]:
    """Return how many cells each raw signal needs."""
    blocks, norms = len(structure.blocks), len(structure.norms)
    return {**dict.fromkeys(BLOCK_CELLS, blocks), **dict.fromkeys(NORM_CELLS, norms), **dict.fromkeys(RUN_CELLS, 1)}


def sentinel_names(structure: Structure) -> list[str]:
    """Return the names of the modules that are checked in every step."""
    names = [name for name, _ in leaves(structure)]
    for block in structure.blocks:
        names += [block.attention or block.name, block.feed_forward or block.name, block.name]
    return names


def leaves(structure: Structure) -> list[tuple[str, nn.Module]]:
    """Return the modules outside the blocks that have their own parameters: embeddings, a final norm, a head."""
    inside = {id(part) for block in structure.blocks for part in block.module.modules()}
    found = [
        (name or "the model", module)
        for name, module in structure.model.named_modules()
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False))
    ]
    return found[:MOST_LEAVES]


class Hook:
    """A monitoring hook. In a copied or pickled model it does nothing, because that model is not monitored."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (do_nothing,)


class QuietHook(Hook):
    """A hook that torch.compile leaves out of its graphs."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def do_nothing(*args: Any) -> None:
    """Do nothing; unpickled hooks call this."""


class Hooks:
    """All hooks registered on the model.

    Args:
        failed: called with a monitoring error, which must not end the training.
        compiled: whether torch.compile runs the model or a part of it.
    """

    def __init__(
        self, structure: Structure, buffer: StatsBuffer, failed: Callable[[Exception], None], compiled: bool = False
    ) -> None:
        self._structure, self._buffer, self._failed = structure, buffer, failed
        self.gate = Gate()
        self.placements = Placements(structure)
        self.dtype: torch.dtype | None = None
        self._handles: list[RemovableHandle] = []
        self._running: list[
            tuple[int, Tensor | None, int]
        ] = []  # blocks that are running: index, input and its version
        self._attention = [AttentionProbe(buffer, index) for index in range(len(structure.blocks))]
        self._calls: list[list[tuple[Tensor, NormCall | None]]] = []  # norms that are running: their inputs
        # For compiled graphs: the probes that they call, and the attention probe of the block that is being traced.
        self._compiled = compiled
        self._traced: list[CompiledProbe] = []
        self._tracing: CompiledProbe | None = None
        self._thread = threading.get_ident()
        self._open = ExitStack()
        self._vocabularies = {embedding.num_embeddings for _, embedding in structure.embeddings}

    # Attaching --------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        structure, buffer = self._structure, self._buffer
        if structure.blocks:
            self._open.enter_context(listening(Listener(self._before_attention, self._before_softmax)))
        place = 0
        self._on_root()
        for _, module in leaves(structure):
            self._on_output(module, Sentinel(buffer, place))
            place += 1
        for index, block in enumerate(structure.blocks):
            self._on_block(block, index, place)
            place += 3
        for index, norm in enumerate(structure.norms):
            self._on_norm(norm, NormProbe(buffer, norm, index))

    def detach(self) -> None:
        """Remove every hook."""
        self.rest()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._open.close()

    def rest(self) -> None:
        """End a step; clear what an exception in a forward pass may have left."""
        self.gate.inside = None
        self._running = []
        for calls in self._calls:
            calls.clear()
        probe.current = None

    def _trace(self, see: Callable[..., None]) -> CompiledProbe:
        """Return a probe for compiled graphs, whose errors do not reach the training either."""
        site = CompiledProbe(lambda *tensors: self._safely(lambda: see(*tensors)))
        self._traced.append(site)
        return site

    def _before_attention(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> None:
        if is_compiling():
            if self._tracing is not None and torch.is_grad_enabled():
                self._put_attention(self._tracing, q, k, mask, causal, scale)
            return
        site = self._running_attention()
        if site is not None:
            self._safely(lambda: site.see(q, k, mask, causal, scale))

    def _before_softmax(self, logits: Any, dim: Any) -> None:
        site = self._running_attention()
        if site is not None and isinstance(logits, Tensor) and dim in (-1, logits.ndim - 1):
            self._safely(lambda: site.see_logits(logits))

    def _put_attention(
        self, site: CompiledProbe, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> None:
        # The operator takes only tensors: the scale is a tensor on the host, and its length encodes causality.
        with torch.no_grad():
            constants = torch.full((2 if causal else 1,), UNKNOWN if scale is None else scale)
        site.put([q, k, constants, *([] if mask is None else [mask])])

    def _running_attention(self) -> AttentionProbe | None:
        """Return the probe of the block that is running in a sampled step; None for torch.nn.MultiheadAttention."""
        if not self._buffer.sampling or not self._running or threading.get_ident() != self._thread:
            return None
        index = self._running[-1][0]
        hidden = isinstance(self._structure.blocks[index].attention_module, nn.MultiheadAttention)
        return None if hidden or not self.gate.is_open() else self._attention[index]

    def _register(
        self, module: nn.Module, before: Callable[..., Any] | None, after: Callable[..., Any], with_kwargs: bool = False
    ) -> None:
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(Hook(before), with_kwargs=with_kwargs))
        self._handles.append(module.register_forward_hook(Hook(after), with_kwargs=with_kwargs))

    # The hooks --------------------------------------------------------------------------------------------------------

    def _on_root(self) -> None:
        site = LogitsProbe(self._buffer)
        traced = self._trace(site.see)

        def before(module: nn.Module, args: Any) -> None:
            if not is_compiling() and not in_backward():
                self.gate.inside = torch.is_grad_enabled()
                self._running = []

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if is_compiling():
                logits = find_logits(output, self._vocabularies) if torch.is_grad_enabled() else None
                if logits is not None:
                    traced.put([logits])
                return
            if in_backward():
                return
            if self._buffer.sampling and self.gate.is_open():
                logits = find_logits(output, self._vocabularies)
                if logits is not None:
                    self._safely(lambda: site.see(logits))
            self.gate.inside = None

        root = self._structure.model
        if self._compiled:
            # A compiled model calls its own hooks outside its graph, and each would become a separate graph.
            self._handles.append(root.register_forward_pre_hook(QuietHook(before)))
            self._handles.append(root.register_forward_hook(QuietHook(after)))
            return
        self._register(root, before, after)

    def _on_output(self, module: nn.Module, site: Sentinel) -> None:
        traced = self._trace(site.see)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            y = first_tensor(output)
            if y is None:
                return
            if is_compiling():
                self._put(traced, y)
            elif self.gate.is_open():
                self._safely(lambda: site.see(y))

        self._register(module, None, after)

    def _on_block(self, block: Block, index: int, place: int) -> None:
        self._on_writer(block.attention_writer, WriterProbe(self._buffer, place, index, "attention"))
        self._on_writer(block.feed_forward_writer, WriterProbe(self._buffer, place + 1, index, "feed_forward"))
        site = BlockProbe(self._buffer, place + 2, index)

        def see(y: Tensor, x: Tensor | None = None) -> None:
            site.see(y, x)
            if self._buffer.sampling:
                self.dtype = self.dtype or y.dtype
                self.placements.graph_block(index, y, x)

        traced, tapped = self._trace(see), self._trace(site.see_gradient_if_sampled)
        attention = self._trace(self._attention[index].see_some)

        def before(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            if is_compiling():
                self._tracing = attention
                return
            if not self._buffer.sampling or in_backward():
                return
            x = first_tensor([*args, *kwargs.values()])
            self._running.append((index, x, -1 if x is None else x._version))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            y = first_tensor(output)
            if is_compiling():
                self._tracing = None
                x = first_tensor([*args, *kwargs.values()])
                if y is None or not torch.is_grad_enabled():
                    return None
                self._put(traced, y, *([] if x is None else [x]))
                return with_first_tensor(output, tapped.tap(y))
            running = self._running.pop() if self._running and not in_backward() else (index, None, -1)
            if y is None:
                return None
            if self.gate.is_open():
                self._safely(lambda: self._see_block(site, y, running))
            if self._buffer.sampling and y.requires_grad:
                y.register_hook(lambda dy: self._safely(lambda: site.see_gradient(dy)))  # type: ignore[no-untyped-call]
            return None

        self._register(block.module, before, after, with_kwargs=True)

    def _see_block(self, site: BlockProbe, y: Tensor, running: tuple[int, Tensor | None, int]) -> None:
        _, x, version = running
        overwritten = x is not None and x._version != version
        site.see(y, None if overwritten else x)
        if self._buffer.sampling:
            self.dtype = self.dtype or y.dtype
            self.placements.block_made(site.index, y)

    def _on_writer(self, module: nn.Module | None, site: WriterProbe) -> None:
        if module is None:
            return

        traced = self._trace(site.see)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            y = first_tensor(output)
            hidden = first_tensor(args) if site.role == "feed_forward" else None
            if y is None:
                return
            if is_compiling():
                self._put(traced, y, *([] if hidden is None else [hidden]))
                return
            if not self.gate.is_open() or (self._running and self._running[-1][0] != site.index):
                return  # an evaluation, or another block that shares this module
            self._safely(lambda: site.see(y, hidden))
            if self._buffer.sampling and isinstance(module, nn.MultiheadAttention):
                self._safely(lambda: see_multihead(self._attention[site.index], module, args, kwargs))

        self._register(module, None, after, with_kwargs=True)

    def _on_norm(self, norm: Norm, site: NormProbe) -> None:
        calls: list[tuple[Tensor, NormCall | None]] = []
        self._calls.append(calls)
        block = norm.facts.block

        def see(x: Tensor, y: Tensor | None = None) -> None:
            site.see_if_sampled(x)
            if self._buffer.sampling and block is not None and y is not None:
                self.placements.graph_norm(block, x, y)

        traced, tapped = self._trace(see), self._trace(site.see_output_if_sampled)

        def before(module: nn.Module, args: Any) -> None:
            if is_compiling() or not self._buffer.sampling:
                return
            x = first_tensor(args)
            counts = self.gate.is_open()
            if x is None or not (counts or in_backward()):
                return
            if norm.facts.block is not None and counts and self._running:
                self.placements.norm_read(norm.facts.block, x is self._running[-1][1])
            call = NormCall(site, x.shape, counts, self._safely) if norm.facts.ours else None
            probe.current = call
            calls[:] = [(x, call)]  # a call that is still there ended in an exception

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if is_compiling():
                x = first_tensor(args)
                if x is not None:
                    self._put(traced, x, *([output] if isinstance(output, Tensor) else []))
                # The backward pass of an omninorm norm is a separate operator anyway, so this costs no fusion.
                grown = isinstance(output, Tensor) and torch.is_grad_enabled() and norm.facts.ours and site.trainable
                return tapped.tap(output, keep=True) if grown else None
            if not calls:
                return None
            x, call = calls.pop()
            probe.current = None
            if not isinstance(output, Tensor):
                return None
            if call is None or not call.reached:
                if self.gate.is_open():
                    self._safely(lambda: site.see(x))
                hook_examples(site, output, self._safely)
            self.placements.norm_made(output)
            return None

        self._register(norm.module, before, after)

    def _put(self, traced: CompiledProbe, *tensors: Tensor) -> None:
        """Put a probe into the graph that is being traced, unless it is for evaluation."""
        if torch.is_grad_enabled():
            traced.put(tensors)

    def _safely(self, measure: Callable[[], None]) -> None:
        """Measure without a graph. A monitoring error is reported once and does not reach the training."""
        with torch._C.DisableTorchFunction():
            safely(measure, self._failed)
