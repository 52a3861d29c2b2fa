"""Measures the placement of the blocks' norms in one forward pass: from the autograd graph, or the identity of tensors.

The identity alone shows whether a norm reads a block's input and whether the block's output is a norm's output.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter

import torch
from torch import Tensor

from omninorm.monitor.model_map.residual import BlockGraph, Node, NormUse
from omninorm.monitor.model_map.structure import Structure, matrix_names
from omninorm.monitor.tensors import version_of

NO_PASS = "no forward pass of the blocks with gradients has been measured"
INLINED = "the blocks normalize by arithmetic in their own code, not by a norm that can be located"
_FEWEST_BLOCKS = 3  # of a stack that is reported to have no residual connection
_MOST_OUTPUTS = 6  # norms of one block whose outputs are searched for a sum


class Placements:
    """The placement of the blocks' norms, from the tensors that they read and return in one forward pass."""

    def __init__(self, structure: Structure) -> None:
        self._with_norms = {norm.facts.block for norm in structure.norms if norm.facts.block is not None}
        self._inlined: set[int] = set()
        self._from_graph: dict[int, tuple[str | None, str]] = {}
        self._uses: dict[int, list[NormUse]] = {}
        # Blocks that return no sum with their input, and the output of the block before, to see that it is the input of
        # the next one: other code may add the residual between blocks.
        self._count, self._firsts = len(structure.blocks), {chain[0] for chain in structure.chains if chain}
        self._no_sum: set[int] = set()
        self._split: set[int] = set()
        self._newest_end: Node = None
        # Blocks that add their input, that certainly do not, and whose output the next block reads as it is.
        self._structure = structure
        self._adds: set[int] = set()
        self._drops: set[int] = set()
        self._read: set[int] = set()
        self._newest_block = -1
        # Without a graph: blocks whose input a norm reads, and blocks whose output a norm returned.
        self._reads_input: set[int] = set()
        self._makes_output: set[int] = set()
        self._adds_normed: set[int] = set()
        self._newest: weakref.ref[Tensor] | None = None
        self._reads: set[int] = set()
        self._made: list[tuple[int, Tensor]] = []
        self._judged: set[int] = set()

    def inlined(self, block: int) -> None:
        """Record that the block computed a reciprocal root of a row."""
        self._inlined.add(block)

    def seeks(self, block: int) -> bool:
        """Return whether the placement of a block is not known yet."""
        return block not in self._from_graph

    # Eager mode -------------------------------------------------------------------------------------------------------

    def norm_called(self, block: int, x: Tensor, y: Tensor, block_input: Tensor | None, before: object) -> None:
        """Record that a norm of this block has read x, whose autograd node was `before`, and returned y."""
        self._with_norms.add(block)
        self._newest = weakref.ref(y)
        is_input = block_input is not None and (x is block_input or _same_memory(x, block_input))
        if is_input:
            self._reads_input.add(block)
        if not self.seeks(block):
            return
        if y.grad_fn is None:
            self.graph_norm(block, x, y)
        else:
            self._uses.setdefault(block, []).append(NormUse(before, y.grad_fn, is_input))

    def block_made(self, block: int, y: Tensor, x: Tensor | None, before: object) -> None:
        """Record that the block has read x, whose autograd node was `before`, and returned y."""
        if self._newest is not None and self._newest() is y:
            self._makes_output.add(block)
        self._newest = None
        uses = self._uses.pop(block, [])
        if not self.seeks(block):
            return
        if y.grad_fn is None:
            self.graph_block(block, y, x)
        elif x is not None:
            graph = BlockGraph(before, y.grad_fn, uses)
            self._from_graph[block] = graph.placement()
            follows = before is self._newest_end
            if follows:
                self._read.add(self._newest_block)
            if y.shape == x.shape and (follows or block in self._firsts):
                self._judge_sum(block, graph)
        self._newest_end, self._newest_block = y.grad_fn, block

    def _judge_sum(self, block: int, graph: BlockGraph) -> None:
        if graph.adds_input():
            self._adds.add(block)
        else:
            self._no_sum.add(block)
            if graph.drops_input():
                self._drops.add(block)

    def has_several_outputs(self, block: int) -> None:
        """Record that the block returned several tensors like its output: one of them may be the residual stream."""
        self._split.add(block)

    def without_residual(self) -> bool:
        """Return whether it is certain that no block has a residual connection."""
        return self._count >= _FEWEST_BLOCKS and len(self._no_sum - self._split) == self._count

    def without_input(self) -> tuple[int, ...]:
        """Return the blocks that certainly do not add their input, although most of the others in their chain do.

        They have attention, or the same matrices as another block: plain layers between residual blocks are legitimate.
        """
        if not self._drops:
            return ()
        blocks, found = self._structure.blocks, list[int]()
        names = [matrix_names(block.module) for block in blocks]
        usual = {at for at, block in enumerate(blocks) if block.attention or names.count(names[at]) > 1}
        for chain in self._structure.chains:
            if 2 * len(self._adds.intersection(chain)) > len(chain) - 1:
                # What the last block returns is read by other modules.
                found += sorted((self._drops - self._split) & (self._read | {chain[-1]}) & set(chain) & usual)
        return tuple(found)

    def clear(self) -> None:
        """Drop the graph of a forward pass that has not ended."""
        self._uses.clear()
        self._newest = self._newest_end = None
        self._reads.clear()
        self._made = []

    # Without an autograd graph: in a compiled graph, in a frozen block and under reentrant checkpointing. In a compiled
    # graph tensors have no lasting identity. Their addresses identify them while they are alive, and a few elements
    # show whether an address has been reused.

    def graph_norm(self, block: int, x: Tensor, y: Tensor) -> None:
        """Record that a norm of this block has read x and returned y."""
        self._with_norms.add(block)
        if block in self._judged:
            return
        self._reads.add(x.data_ptr())
        self._made.append((y.data_ptr(), few(y)))

    def graph_block(self, block: int, y: Tensor, x: Tensor | None) -> None:
        """Record that the block has read x and returned y."""
        if block not in self._judged:
            self._judged.add(block)
            if x is not None and x.data_ptr() in self._reads:
                self._reads_input.add(block)
            if self._made and self._made[-1][0] == y.data_ptr() and torch.equal(self._made[-1][1], few(y)):
                self._makes_output.add(block)
            elif x is not None and self._is_sum(few(x), few(y)):
                self._adds_normed.add(block)
        self._reads.clear()
        self._made = []

    def _is_sum(self, x: Tensor, y: Tensor) -> bool:
        """Return whether y is x plus outputs of norms."""
        made = [values.double() for _, values in self._made[:_MOST_OUTPUTS] if values.shape == x.shape]
        close = 16 * torch.finfo(y.dtype).eps * float(torch.stack([x, y]).abs().max())
        difference = y.double() - x.double()
        sums = (
            torch.stack(chosen).sum(0)
            for count in range(1, len(made) + 1)
            for chosen in itertools.combinations(made, count)
        )
        return any(float((total - difference).abs().max()) <= close for total in sums)

    # The result ---------------------------------------------------------------------------------------------------

    def verdict(self, blocks: int) -> tuple[str | None, str]:
        """Return the placement of most blocks, and the reason if it is None.

        It is "pre", "post", "both" (before each branch and after each sum), "sandwich" (before and after each branch),
        "reordered" (after each branch) or "none".
        """
        if not blocks:
            return None, "the model has no recognizable stack of blocks"
        if not self._with_norms and not self._inlined:
            return "none", ""
        if not self._with_norms:
            return None, INLINED
        found = [self._of_block(block) for block in range(blocks)]
        name, count = Counter(place for place, _ in found).most_common(1)[0]
        if name is not None and 2 * count > blocks:
            return name, ""
        if name is None:
            return None, Counter(reason for place, reason in found if place is None).most_common(1)[0][0]
        counts = Counter(place or "unknown" for place, _ in found)
        return None, "the blocks differ: " + ", ".join(f"{count} × {place}" for place, count in counts.items())

    def _of_block(self, block: int) -> tuple[str | None, str]:
        if block in self._from_graph:
            return self._from_graph[block]
        pre, post = block in self._reads_input, block in self._makes_output
        if post:
            return ("both" if pre else "post"), ""
        if block in self._adds_normed:
            return ("sandwich" if pre else "reordered"), ""
        return ("pre", "") if pre else (None, NO_PASS)


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.data_ptr() == y.data_ptr() and version_of(x) == version_of(y)


def few(x: Tensor) -> Tensor:
    """Return a copy of the first elements of x."""
    return x.detach().reshape(-1)[:16].clone()
