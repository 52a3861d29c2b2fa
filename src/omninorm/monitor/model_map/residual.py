"""Reads a block's placement from its autograd graph: where its norms are, relative to its additions to the stream.

The trunk is the path from the block's output to its input along additions. Every addition on it ends a sublayer, whose
other operand is the branch. A norm on the trunk normalizes the stream itself (post-norm); one that reads the trunk
normalizes a branch's input (pre-norm); one whose output is added normalizes a branch's output.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node, or None for a tensor without gradients
# Operations that change neither what the stream holds nor its layout beyond recognition.
_PASSES = (
    "View", "UnsafeView", "Reshape", "Transpose", "Permute", "TBackward", "Unsqueeze", "Squeeze", "ToCopy", "Clone",
    "Mul", "Div", "NativeDropout", "FusedDropout", "Slice", "Expand", "Alias", "Copy", "AsStrided", "Neg", "Flatten",
    "BackwardHook", "Identity", "RegisterPostBackward", "Movedim", "Detach", "Unflatten", "Contiguous", "Constant",
)  # fmt: skip
_PRODUCTS = (
    "AddmmBackward", "MmBackward", "BmmBackward", "BaddbmmBackward", "LinearBackward", "ConvolutionBackward",
    "GroupedMmBackward",
)  # fmt: skip
_SCALES = ("Mul", "Div", "Neg")
_LONGEST, _DEEPEST = 400, 100
_OWN_PATH = "the path from a block's input to its output is not a chain of additions, as with several streams"


@dataclass
class NormUse:
    """One call of a norm in a block: the autograd nodes of its input and output, and whether its input is the block's
    input."""

    reads: Node
    makes: Node
    reads_input: bool


def node_of(x: Tensor) -> Node:
    """Return the autograd node of a tensor; for a leaf that requires gradients, the one that accumulates them."""
    if x.grad_fn is not None or not x.requires_grad or not torch.is_grad_enabled():
        return x.grad_fn
    return x.view_as(x).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


@dataclass
class Step:
    """A step on the trunk, from the block's output to its input: an addition with its branches, a norm, or neither."""

    node: Node
    branches: Sequence[Node] = ()
    norm: NormUse | None = None


class BlockGraph:
    """The trunk of one block and the norms at it.

    Args:
        start: the node of the block's input.
        end: the node of its output.
        uses: the norms that ran in the block.
    """

    def __init__(self, start: Node, end: Node, uses: Sequence[NormUse]) -> None:
        self._start, self._end = start, end
        self._by_output = {id(use.makes): use for use in uses if use.makes is not None}
        self._uses = uses
        self._dead_ends: set[int] = set()
        self._steps_left = _LONGEST
        self.trunk = self._follow(end)

    def adds_input(self) -> bool:
        """Return whether the output is a sum with the block's input, which is not subtracted again."""
        added = [step for step in self.trunk or () if step.branches]
        return bool(added) and not any(
            step.node.name().startswith("SubBackward") and any(branch is self._start for branch in step.branches)
            for step in added
            if self._start is not None
        )

    def drops_input(self) -> bool:
        """Return whether the output is certainly no sum with the block's input: the input reaches it only through
        matrix products, or is subtracted again."""
        terms = list(itertools.islice(self._terms(self._end, 1, set()), _LONGEST))
        inputs = [sign for node, sign in terms if self._is_start(node)]
        return len(inputs) < len(terms) < _LONGEST and sum(inputs) == 0 and 0 not in inputs

    def placement(self) -> tuple[str | None, str]:
        """Return the placement and, if it is None, the reason."""
        if self.trunk is None:
            return None, _OWN_PATH
        additions = [step for step in self.trunk if step.branches]
        if not additions:
            return None, "a block's output is not a sum with its input"
        readers = self._segments_with_readers()
        if any(step.norm for step in self.trunk):
            first = next(step for step in self.trunk if step.branches or step.norm)
            if first.norm is None:
                return None, "the norms are on the stream itself, but not after a block's last sublayer"
            return ("both" if any(readers) else "post"), ""
        before = readers[-1] or 2 * sum(readers) > len(additions)
        after = 2 * sum(self._is_normed(step.branches) for step in additions) > len(additions)
        if before or after:
            return ("sandwich" if before and after else "pre" if before else "reordered"), ""
        return None, "the norms neither read the stream nor normalize what is added to it"

    def _follow(self, node: Node) -> list[Step] | None:
        """Return the steps from a node to the block's input, or None if there is no such path."""
        steps: list[Step] = []
        while not self._is_start(node):
            self._steps_left -= 1
            if node is None or self._steps_left < 0 or id(node) in self._dead_ends:
                return None
            use, parents = self._by_output.get(id(node)), _parents(node)
            if use is not None:
                steps.append(Step(node, norm=use))
                if use.reads_input:
                    return steps
                node = use.reads
            elif _adds(node):
                found = self._follow_sum(node, parents)
                if found is None:
                    self._dead_ends.add(id(node))
                return None if found is None else [*steps, *found]
            elif (passed := self._pass(node, parents)) is not node:
                steps.append(Step(node))
                node = passed
            else:
                return None
        return steps

    def _follow_sum(self, node: Node, parents: Sequence[Node]) -> list[Step] | None:
        for at, parent in enumerate(parents):
            rest = self._follow(parent)
            if rest is not None:
                return [Step(node, [other for place, other in enumerate(parents) if place != at]), *rest]
        return None

    def _terms(self, node: Node, sign: int, seen: set[int], depth: int = 0) -> Iterator[tuple[Node, int]]:
        """Yield the terms of the sum that a node computes, the input and matrix products, each with its sign: 0 after
        any operation that is no addition. Parameters are left out, and so are nodes in `seen`, after such operations.
        """
        if depth > _DEEPEST:
            yield self._start, 0  # unknown
        elif self._is_start(node) or (node is not None and node.name().startswith(_PRODUCTS)):
            yield node, sign
        elif node is not None and not _is_leaf(node) and (sign or id(node) not in seen):
            if not sign:
                seen.add(id(node))
            for operand, factor in self._operands(node):
                yield from self._terms(operand, sign * factor, seen, depth + 1)

    def _operands(self, node: Node) -> list[tuple[Node, int]]:
        """Return the operands of an operation, each with the factor with which it is added, or 0 if it is not."""
        use, parents = self._by_output.get(id(node)), _parents(node)
        if use is not None:
            return [(self._start if use.reads_input else use.reads, 0)]
        if _adds(node):
            return list(zip(parents, (1, _factor(node)), strict=False))
        before = self._pass(node, parents)
        if before is not node:
            return [(before, 0 if node.name().startswith(_SCALES) else 1)]
        return [(parent, 0) for parent in parents]

    def _is_start(self, node: Node) -> bool:
        return node is self._start

    def _pass(self, node: Node, parents: Sequence[Node]) -> Node:
        """Return the node before an operation that passes the stream on; the node itself for another operation."""
        if not node.name().removeprefix("torch::autograd::").startswith(_PASSES):
            return node
        # The start may be a leaf; other leaves are parameters, such as a scale.
        inner = [each for each in parents if each is not None and (each is self._start or not _is_leaf(each))]
        if not inner and self._start is None and None in parents:
            return None
        return inner[0] if len(inner) == 1 else node

    def _segments_with_readers(self) -> list[bool]:
        """Return for each stretch of the trunk between additions, the output's first, whether a norm off the trunk
        reads it."""
        assert self.trunk is not None
        segment, at = 0, {}
        on_trunk = {id(step.norm) for step in self.trunk if step.norm}
        for step in self.trunk:
            at[id(step.node)] = segment
            segment += bool(step.branches)
        found = [False] * (segment + 1)
        for use in self._uses:
            if id(use) in on_trunk:
                continue
            place = segment if use.reads_input else self._place(use.reads, at, segment)
            if place is not None:
                found[place] = True
        return found

    def _place(self, node: Node, at: dict[int, int], last: int) -> int | None:
        """Return the stretch of the trunk that a node is on, or comes from without a change."""
        for _ in range(8):
            if node is None:
                return None
            if node is self._start:
                return last
            if id(node) in at:
                return at[id(node)]
            before = self._pass(node, _parents(node))
            if before is node:
                return None
            node = before
        return None

    def _is_normed(self, branches: Sequence[Node]) -> bool:
        """Return whether the branches' outputs are outputs of norms."""
        ends = [end for branch in branches for end in self._ends(branch)]
        return bool(ends) and all(id(end) in self._by_output for end in ends)

    def _ends(self, node: Node, depth: int = 0) -> Iterator[Node]:
        """Yield the operations whose results a branch adds, past dropout and scales."""
        for _ in range(16):
            if node is None or id(node) in self._by_output:
                break
            if _adds(node) and depth < 4:
                for parent in _parents(node):
                    yield from self._ends(parent, depth + 1)
                return
            before = self._pass(node, _parents(node))
            if before is node:
                break
            node = before
        if node is not None and not _is_leaf(node):  # the sum with a bias is not a branch
            yield node


def _parents(node: Node) -> list[Node]:
    return [parent for parent, _ in node.next_functions]


def _adds(node: Node) -> bool:
    return bool(node.name().startswith(("AddBackward", "SubBackward")))


def _factor(node: Node) -> int:
    """Return the sign of the second operand of a sum; 0 if it is scaled."""
    if getattr(node, "_saved_alpha", 1) != 1:
        return 0
    return -1 if node.name().startswith("Sub") else 1


def _is_leaf(node: Node) -> bool:
    return "AccumulateGrad" in node.name()
