"""Hooks on the routers of mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from omninorm.monitor.history import Load
from omninorm.monitor.model_map.parts import Block
from omninorm.monitor.model_map.structure import Structure
from omninorm.monitor.probes.router import RouterProbe, choices_in
from omninorm.monitor.stats_buffer import StatsBuffer

if TYPE_CHECKING:
    from omninorm.monitor.hooks.attach import Hooks

LOADS = "expert_load"


class RouterHooks:
    """The hooks of all routers; `take` returns the counts of a sampled step, and `read` makes loads of them."""

    def __init__(self, hooks: Hooks, structure: Structure, buffer: StatsBuffer) -> None:
        self._hooks, self._structure, self._buffer = hooks, structure, buffer
        self._probes = {
            index: RouterProbe(buffer, block.experts, hooks.padding)
            for index, block in enumerate(structure.blocks)
            if block.router is not None
        }
        self._inside: int | None = None  # the block whose router is running
        self._held: Tensor | None = None  # its choices, in case it does not return them
        self._taken: list[int] = []

    @property
    def exist(self) -> bool:
        """Whether there are any."""
        return bool(self._probes)

    def attach(self) -> None:
        """Register the hooks."""
        for index in self._probes:
            self._on_router(self._structure.blocks[index], index)

    def _on_router(self, block: Block, index: int) -> None:
        assert block.router is not None
        hooks, probe = self._hooks, self._probes[index]
        traced = hooks.trace(probe.see)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not is_compiling() and self._buffer.sampling:
                self._inside, self._held = index, None

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            chosen = choices_in(output, probe.experts)
            if is_compiling():
                if chosen is not None:
                    hooks.put(traced, chosen)
                return
            chosen = self._held if chosen is None else chosen
            self._inside = self._held = None
            if chosen is not None and self._buffer.sampling and hooks.gate.is_open():
                hooks.safely(lambda: probe.see(chosen))

        hooks.register_for_samples(block.router[1], before, after)

    def choose(self, x: Any, chosen: Any) -> None:
        """Count the choices that the running block makes from x, its router's output: by topk or argmax."""
        hooks = self._hooks
        if not self._buffer.sampling or not hooks.running or not hooks.is_own_thread() or not hooks.gate.is_open():
            return
        index = hooks.running[-1].block
        probe = self._probes.get(index)
        if probe is None or type(x) is not Tensor or type(chosen) is not Tensor:
            return
        if x.ndim < 2 or x.shape[-1] != probe.experts:
            return
        if chosen.shape == x.shape[:-1]:
            chosen = chosen.unsqueeze(-1)
        if chosen.shape[:-1] != x.shape[:-1] or chosen.shape[-1] >= probe.experts:
            return
        if self._inside == index:
            self._held = chosen
        else:
            hooks.safely(lambda: probe.see(chosen))

    def take(self) -> dict[str, Tensor]:
        """Return the counts since the last call."""
        found = {index: probe.take() for index, probe in self._probes.items()}
        counted = {index: counts for index, counts in found.items() if counts is not None}
        self._taken = list(counted)
        return {LOADS: torch.cat([c.to(self._buffer.device) for c in counted.values()])} if counted else {}

    def read(self, numbers: dict[str, list[float]]) -> list[Load | None]:
        """Return the load of each block's experts, from the numbers of `take`, which are removed."""
        loads: list[Load | None] = [None] * len(self._structure.blocks)
        left = numbers.pop(LOADS, [])
        for index in self._taken if left else []:
            probe = self._probes[index]
            counts, left = left[: probe.experts + 1], left[probe.experts + 1 :]
            loads[index] = load_of(counts[:-1], counts[-1], probe.choices)
        return loads


def load_of(counts: list[float], tokens: float, choices: int) -> Load | None:
    """Return the experts' load; None without tokens, or if every expert seems to get all of them."""
    if tokens <= 0.0 or min(counts) >= tokens:
        return None
    shares = tuple(count / tokens for count in counts)
    return Load(shares, int(tokens), choices or max(1, round(sum(shares))))
