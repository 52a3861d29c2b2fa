"""Where the blocks' norms stand: measured, by the identity of tensors."""

from __future__ import annotations

import weakref

from torch import Tensor

from omninorm.watch.structure import Structure


class Placements:
    """Where the blocks' norms stand, measured in one forward pass by which tensors they read and make."""

    def __init__(self, structure: Structure) -> None:
        inside = [norm.facts.block for norm in structure.norms if norm.facts.block is not None]
        self._with_norms = set(inside)
        self._reads_input: set[int] = set()
        self._makes_output: set[int] = set()
        self._newest: weakref.ref[Tensor] | None = None

    def norm_read(self, block: int, is_input: bool) -> None:
        if is_input:
            self._reads_input.add(block)

    def norm_made(self, y: Tensor) -> None:
        self._newest = weakref.ref(y)

    def block_made(self, block: int, y: Tensor) -> None:
        if self._newest is not None and self._newest() is y:
            self._makes_output.add(block)
        self._newest = None

    def verdict(self, blocks: int) -> str | None:
        """ "pre", "post", "both", "none", or None where it is something else; the majority of the blocks decides."""
        if not self._with_norms:
            return "none" if blocks else None
        pre, post = 2 * len(self._reads_input) > blocks, 2 * len(self._makes_output) > blocks
        return "both" if pre and post else "pre" if pre else "post" if post else None
