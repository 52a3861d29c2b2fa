"""Registers forward and backward hooks on the model and removes them together.

In eager mode a hook checks the gate and calls its probe. Under torch.compile it puts one opaque operator into the
graph, which does the same when the graph runs (see `traced`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from omninorm.monitor.hooks.blocks import BlockHooks, Running
from omninorm.monitor.hooks.compiled import CompiledProbe
from omninorm.monitor.hooks.dropout import FunctionalDropout
from omninorm.monitor.hooks.hook import Hook, QuietHook
from omninorm.monitor.hooks.intercept import Listener, listening
from omninorm.monitor.hooks.norms import NormHooks
from omninorm.monitor.hooks.peaks import OnlyPeaks, OutputHook
from omninorm.monitor.hooks.routers import RouterHooks
from omninorm.monitor.hooks.training_pass import Gate, in_backward, safely
from omninorm.monitor.model_map.parts import Block
from omninorm.monitor.model_map.placement import Placements
from omninorm.monitor.model_map.residual import Node, node_of
from omninorm.monitor.model_map.structure import Structure
from omninorm.monitor.probes.attention import UNKNOWN, AttentionProbe, see_multihead
from omninorm.monitor.probes.block import BlockProbe, Copies, LogitsProbe, Sentinel, WriterProbe
from omninorm.monitor.probes.causality import Causality
from omninorm.monitor.probes.loss import see_loss
from omninorm.monitor.probes.norm import NormProbe, choose_with_examples
from omninorm.monitor.probes.padding import Padding
from omninorm.monitor.stats_buffer import StatsBuffer
from omninorm.monitor.tensors import find_logits, first_argument, first_tensor

# The number of modules outside the blocks whose outputs are checked for NaNs.
MOST_LEAVES = 64


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
        self.padding = Padding(structure.model)
        self.causality = Causality(buffer)
        self._copies = Copies()
        self.dtype: torch.dtype | None = None
        self.classes: int | None = None
        self.running: list[Running] = []
        self.dropout = FunctionalDropout()
        self._handles: list[RemovableHandle] = []
        self._only_sampled: list[Callable[[], RemovableHandle]] = []
        self._of_sample: list[RemovableHandle] = []
        self.attention = [AttentionProbe(buffer, index, self.causality) for index in range(len(structure.blocks))]
        self._blocks = BlockHooks(self, buffer)
        # For compiled graphs: the probes that they call, and the attention probe of the block that is being traced.
        self._compiled = compiled
        self._traced: list[CompiledProbe] = []
        self.tracing: CompiledProbe | None = None
        self.tracing_norms: tuple[CompiledProbe | None, torch.Size | None] | None = None
        self._thread = threading.get_ident()
        self._open = ExitStack()
        self.see_norms: Callable[[Any, Sequence[Tensor]], None] | None = None
        self._vocabularies = {embedding.num_embeddings for _, embedding in structure.embeddings}
        self.peaks = OnlyPeaks(self.gate, buffer, self.safely, failed)
        self.norms = NormHooks(self, structure, buffer)
        self.routers = RouterHooks(self, structure, buffer)

    # Attaching --------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        structure, buffer, norms = self._structure, self._buffer, self.norms
        wanted = bool(structure.blocks) and norms.are_missing
        listener = Listener(
            self._before_attention,
            self._before_softmax,
            norms.function,
            norms.root,
            wanted,
            self._before_loss,
            self._before_dropout,
            self.routers.choose if self.routers.exist else None,
            self.see_norms,
            lambda: buffer.sampling,
        )
        self._open.enter_context(listening(listener))
        place = 0
        self._on_root()
        lists = any(block.parts for block in structure.blocks)
        for _, module in leaves(structure):
            self._on_output(module, Sentinel(buffer, place), self._blocks.before_other if lists else None)
            place += 1
        for index, block in enumerate(structure.blocks):
            self._on_block(block, index, place)
            place += 3
        probes = [NormProbe(buffer, norm, index, self.padding) for index, norm in enumerate(structure.norms)]
        choose_with_examples(probes)
        for norm, probe in zip(structure.norms, probes, strict=True):
            norms.attach(norm, probe)
        self.routers.attach()

    def detach(self) -> None:
        """Remove every hook."""
        self.rest()
        for handle in (*self._handles, *self._of_sample):
            handle.remove()
        self._handles, self._of_sample = [], []
        self._open.close()

    def begin_step(self) -> None:
        """Register the hooks that only sampled steps need, or remove them: a module without hooks is called faster."""
        if not self._buffer.sampling:
            for handle in self._of_sample:
                handle.remove()
            self._of_sample = []
        elif not self._of_sample:
            self._of_sample = [register() for register in self._only_sampled]

    def rest(self) -> None:
        """End a step; clear what an exception in a forward pass may have left."""
        self.safely(self._buffer.measure)
        self.end_pass()
        self.running = []
        self._blocks.clear()
        self.padding.clear()
        self.causality.clear()
        self._copies.clear()
        self.placements.clear()
        self.norms.clear()

    def end_pass(self) -> None:
        """End a forward pass of the model."""
        self.gate.inside, self.peaks.wanted = None, False

    def trace(self, see: Callable[..., None]) -> CompiledProbe:
        """Return a probe for compiled graphs, whose errors do not reach the training either."""

        def measure(*tensors: Tensor) -> None:
            see(*tensors)
            self._buffer.measure_peaks()  # the graph may write to the same memory next

        site = CompiledProbe(lambda *tensors: self.safely(lambda: measure(*tensors)))
        self._traced.append(site)
        return site

    def _before_attention(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> None:
        if is_compiling():
            if self.tracing is not None and torch.is_grad_enabled():
                self._put_attention(self.tracing, q, k, mask, causal, scale)
            return
        site = self._running_attention()
        if site is not None:
            self.safely(lambda: site.see(q, k, mask, causal, scale))

    def _before_softmax(self, logits: Any, dim: Any) -> None:
        site = self._running_attention()
        if site is not None and isinstance(logits, Tensor) and dim in (-1, logits.ndim - 1):
            self.safely(lambda: site.see_logits(logits))

    def _before_loss(self, logits: Any, labels: Any) -> None:
        if self._buffer.sampling and self.is_own_thread() and self.gate.is_open():
            self.safely(lambda: see_loss(self._buffer, logits))
            inside = bool(self.gate.inside)
            self.safely(lambda: self.causality.see_labels(logits, labels, inside))
            if isinstance(logits, Tensor) and logits.requires_grad and logits.ndim > 0:
                self.classes = max(self.classes or 0, logits.shape[min(1, logits.ndim - 1)])

    def _before_dropout(self, p: float, training: bool) -> None:
        if not self.is_own_thread():
            return
        if self.gate.inside is False and training and p > 0.0 and not in_backward():
            self.dropout.evaluated = True
        elif self._buffer.sampling and self.running and self.gate.is_open():
            self.dropout.see(self._structure.blocks[self.running[-1].block], p, training)

    def _put_attention(
        self, site: CompiledProbe, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> None:
        # The operator takes only tensors: the scale is a tensor on the host, and its length encodes causality.
        with torch.no_grad():
            constants = torch.full((2 if causal else 1,), UNKNOWN if scale is None else scale, dtype=torch.float64)
        site.put([q, k, constants, *([] if mask is None else [mask])])

    def _running_attention(self) -> AttentionProbe | None:
        """Return the probe of the block that is running in a sampled step; None for torch.nn.MultiheadAttention."""
        if not self._buffer.sampling or not self.running or not self.is_own_thread():
            return None
        index = self.running[-1].block
        hidden = isinstance(self._structure.blocks[index].attention_module, nn.MultiheadAttention)
        return None if hidden or not self.gate.is_open() else self.attention[index]

    def is_own_thread(self) -> bool:
        """Return whether the watch was opened in this thread; other threads run other models."""
        return threading.get_ident() == self._thread

    def register(
        self,
        module: nn.Module,
        before: Callable[..., Any] | None,
        after: Callable[..., Any] | None,
        with_kwargs: bool = False,
    ) -> None:
        """Register a hook before and one after a module's forward."""
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(Hook(before, module), with_kwargs=with_kwargs))
        if after is not None:
            self._handles.append(module.register_forward_hook(Hook(after, module), with_kwargs=with_kwargs))

    def register_for_samples(
        self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None
    ) -> None:
        """Register hooks, with keyword arguments, that do something only in sampled steps.

        A compiled graph serves all steps, so there they are always registered.
        """
        if self._compiled:
            self.register(module, before, after, with_kwargs=True)
            return
        first = Hook(before, module)
        self._only_sampled.append(lambda: module.register_forward_pre_hook(first, with_kwargs=True))
        if after is not None:
            last = Hook(after, module)
            self._only_sampled.append(lambda: module.register_forward_hook(last, with_kwargs=True))

    def register_output(self, module: nn.Module, after: Callable[..., Any], place: int) -> None:
        """Register a hook after the forward of a module whose output is measured in every step."""
        hook = OutputHook(after, module, self.peaks, place)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    # The hooks --------------------------------------------------------------------------------------------------------

    def _on_root(self) -> None:
        site = LogitsProbe(self._buffer)
        traced = self.trace(site.see)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not is_compiling() and not in_backward():
                self.gate.inside = torch.is_grad_enabled()
                self.peaks.begin()
                self.running = []
                self._blocks.clear()
                if self._buffer.sampling and self.gate.is_open():
                    self.safely(lambda: self.padding.read(args, kwargs))
                    self.safely(lambda: self.causality.read(args, kwargs))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if is_compiling():
                logits = find_logits(output, self._vocabularies) if torch.is_grad_enabled() else None
                if logits is not None:
                    traced.put([logits])
                return
            if in_backward():
                return
            self._blocks.end(None)
            if self._buffer.sampling and self.gate.is_open():
                self.safely(lambda: self._see_logits(site, output))
            if self.gate.is_open():
                self.safely(self._buffer.measure)
            self.end_pass()
            self.padding.clear()

        root = self._structure.model
        if self._compiled:
            # A compiled model calls its own hooks outside its graph, and each would become a separate graph.
            self._handles.append(root.register_forward_pre_hook(QuietHook(before, root), with_kwargs=True))
            self._handles.append(root.register_forward_hook(QuietHook(after, root), with_kwargs=True))
            return
        self.register(root, before, after, with_kwargs=True)

    def _see_logits(self, site: LogitsProbe, output: Any) -> None:
        logits = find_logits(output, self._vocabularies)
        self.causality.end(logits)
        if logits is not None:
            site.see(logits)

    def _on_output(self, module: nn.Module, site: Sentinel, before: Callable[..., Any] | None) -> None:
        traced = self.trace(site.see)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            y = first_tensor(output)
            if y is None:
                return
            if is_compiling():
                self.put(traced, y)
            elif not self._buffer.sampling:
                self.peaks.see(site.sentinel, y)
            elif self.gate.is_open():
                self.safely(lambda: site.see(y))

        self.register(module, before, None, with_kwargs=True)
        self.register_output(module, after, site.sentinel)

    def _on_block(self, block: Block, index: int, place: int) -> None:
        self._on_writer(block.attention_writer, WriterProbe(self._buffer, place, index, "attention", self.padding))
        self._on_writer(
            block.feed_forward_writer, WriterProbe(self._buffer, place + 1, index, "feed_forward", self.padding)
        )
        site = BlockProbe(self._buffer, place + 2, index, self.padding, self._copies)
        self._blocks.attach(block, site, self.trace(self.attention[index].see_some))

    def _on_writer(self, module: nn.Module | None, site: WriterProbe) -> None:
        if module is None:
            return

        traced = self.trace(site.see)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            y = first_tensor(output)
            if y is None:
                return
            if not is_compiling() and not self._buffer.sampling:
                self.peaks.see(site.sentinel, y)
                return
            hidden = first_argument(args, {}) if site.role == "feed_forward" else None
            if is_compiling():
                self.put(traced, y, *([] if hidden is None else [hidden]))
                return
            if not self.gate.is_open() or (self.running and self.running[-1].block != site.index):
                return  # an evaluation, or another block that shares this module
            self.safely(lambda: site.see(y, hidden))
            if self._buffer.sampling and isinstance(module, nn.MultiheadAttention):
                self.safely(lambda: see_multihead(self.attention[site.index], module, args, kwargs))

        self.register_output(module, after, site.sentinel)

    def put(self, traced: CompiledProbe, *tensors: Tensor) -> None:
        """Put a probe into the graph that is being traced, unless it is for evaluation."""
        if torch.is_grad_enabled():
            traced.put(tensors)

    def safely(self, measure: Callable[[], None]) -> None:
        """Measure without a graph. A monitoring error is reported once and does not reach the training."""
        if is_compiling():  # compiled autograd traces the gradients' hooks
            return
        with torch._C.DisableTorchFunction():
            safely(measure, self._failed)

    def node_of(self, x: Tensor) -> Node:
        """Return the autograd node of a tensor; None after a monitoring error."""
        if type(x) is Tensor and x.grad_fn is not None:
            return x.grad_fn
        try:
            with torch._C.DisableTorchFunction():
                return node_of(x)
        except Exception as error:
            self._failed(error)
            return None
