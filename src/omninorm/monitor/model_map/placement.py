"""Measures the placement of the blocks' norms, by the identity of tensors."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from omninorm.monitor.model_map.structure import Structure


class Placements:
    """The placement of the blocks' norms, from the tensors that they read and return in one forward pass."""

    def __init__(self, structure: Structure) -> None:
        inside = [norm.facts.block for norm in structure.norms if norm.facts.block is not None]
        self._with_norms = set(inside)
        self._reads_input: set[int] = set()
        self._makes_output: set[int] = set()
        self._newest: weakref.ref[Tensor] | None = None
        self._reads: set[int] = set()
        self._made: tuple[int, Tensor] | None = None
        self._judged: set[int] = set()

    def norm_read(self, block: int, is_input: bool) -> None:
        if is_input:
            self._reads_input.add(block)

    def norm_made(self, y: Tensor) -> None:
        self._newest = weakref.ref(y)

    def block_made(self, block: int, y: Tensor) -> None:
        if self._newest is not None and self._newest() is y:
            self._makes_output.add(block)
        self._newest = None

    # In a compiled graph tensors have no lasting identity. Their addresses identify them while they are alive, and a
    # few elements show whether an address has been reused.

    def graph_norm(self, block: int, x: Tensor, y: Tensor) -> None:
        """Record that a norm of this block has read x and returned y."""
        if block in self._judged:
            return
        self._reads.add(x.data_ptr())
        self._made = y.data_ptr(), few(y)

    def graph_block(self, block: int, y: Tensor, x: Tensor | None) -> None:
        """Record that the block has read x and returned y."""
        if block not in self._judged:
            self._judged.add(block)
            self.norm_read(block, x is not None and x.data_ptr() in self._reads)
            if self._made is not None and self._made[0] == y.data_ptr() and torch.equal(self._made[1], few(y)):
                self._makes_output.add(block)
        self._reads.clear()
        self._made = None

    def verdict(self, blocks: int) -> str | None:
        """Return "pre", "post", "both", "none", or None for anything else, by the majority of the blocks."""
        if not self._with_norms:
            return "none" if blocks else None
        pre, post = 2 * len(self._reads_input) > blocks, 2 * len(self._makes_output) > blocks
        return "both" if pre and post else "pre" if pre else "post" if post else None


def few(x: Tensor) -> Tensor:
    """Return a copy of the first elements of x."""
    return x.detach().reshape(-1)[:16].clone()
