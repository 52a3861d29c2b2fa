"""Finds the modules whose parameters got no gradient although they ran and the rest of the model got one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from omninorm.monitor.checks.facts import NoGradient
from omninorm.monitor.model_map.structure import Structure


@dataclass(frozen=True)
class Ran:
    """The sentinels that saw an output in a step, with their places in the order of execution."""

    order: Mapping[str, int]

    def has(self, name: str) -> bool:
        return name in self.order


class Missing:
    """Turns parameters without a gradient into modules.

    Healthy models have trainable parameters without a gradient: heads and poolers that no loss uses, experts that no
    token chose, blocks that LayerDrop skips. So a module counts only if it ran, and if its output went into modules
    that did get a gradient: it is a block or a part of one, or it ran before a block.

    Args:
        structure: the structure of the model.
        outside: the modules outside the blocks that have sentinels, by name.
    """

    def __init__(
        self, structure: Structure, names: Sequence[str], parameters: Sequence[nn.Parameter], outside: Sequence[str]
    ) -> None:
        self._names, self._parameters, self._structure = names, parameters, structure
        self._blocks = {block.name: self._inside(block.name) for block in structure.blocks}
        in_blocks = {at for places in self._blocks.values() for at in places}
        self._outside = {name: self._direct(name) - in_blocks for name in outside}
        self._cache: dict[tuple[frozenset[int], frozenset[int], tuple[tuple[str, int], ...]], tuple[NoGradient, ...]]
        self._cache = {}

    def find(self, absent: frozenset[int], expected: frozenset[int], ran: Ran) -> tuple[NoGradient, ...]:
        """Return the modules without a gradient.

        Args:
            absent: the expected parameters that have no gradient.
            expected: the parameters that should have one.
            ran: the modules that ran.
        """
        if not absent or absent >= expected:
            return ()
        key = absent, expected, tuple(ran.order.items())
        if key not in self._cache:
            if len(self._cache) > 64:
                self._cache.clear()
            self._cache[key] = tuple(self._find(absent, expected, ran))
        return self._cache[key]

    def _find(self, absent: frozenset[int], expected: frozenset[int], ran: Ran) -> list[NoGradient]:
        if not self._blocks:
            return self._most(absent, expected, ran)
        whole = [name for name, inside in self._blocks.items() if self._is_without(inside, absent, expected, ran, name)]
        found = [finding for stack in self._stacks() for finding in self._of_stack(stack, whole, absent, ran)]
        if not found:
            found = [*self._parts(whole, absent, expected, ran), *self._before_blocks(absent, expected, ran)]
        return [*found, *self._skipped(absent, expected, ran)]

    def _is_without(
        self, inside: Collection[int], absent: frozenset[int], expected: frozenset[int], ran: Ran, block: str
    ) -> bool:
        """Return whether a block and its parts ran, and none of its parameters got a gradient."""
        wanted = expected.intersection(inside)
        writers = self._writers(block)
        return (
            bool(wanted) and wanted <= absent and ran.has(block) and (not writers or any(ran.has(w) for w in writers))
        )

    def _skipped(self, absent: frozenset[int], expected: frozenset[int], ran: Ran) -> list[NoGradient]:
        """Return blocks that were called, but none of their layers was, as far as is known."""
        found = []
        for name, inside in self._blocks.items():
            wanted, writers = expected.intersection(inside), self._writers(name)
            if wanted and wanted <= absent and ran.has(name) and writers and not any(map(ran.has, writers)):
                found.append(NoGradient(name, "skipped", (name,), len(wanted)))
        return found

    def _writers(self, name: str) -> list[str]:
        """Return the sentinels of a block's attention and feed-forward."""
        block = next(block for block in self._structure.blocks if block.name == name)
        pairs = ((block.attention, block.attention_writer), (block.feed_forward, block.feed_forward_writer))
        return [part for part, writer in pairs if part and writer is not None and part != name]

    def _stacks(self) -> list[list[str]]:
        stacks: dict[str, list[str]] = {}
        for name in self._blocks:
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
        return list(stacks.values())

    def _of_stack(
        self, stack: Sequence[str], whole: Sequence[str], absent: frozenset[int], ran: Ran
    ) -> list[NoGradient]:
        """Return a finding about the whole blocks of a stack that have no gradient."""
        without = [name for name in stack if name in whole]
        if not without:
            return []
        last = stack.index(without[-1])
        follows = stack[last + 1] if last + 1 < len(stack) else None
        kind = "blocks"
        if len(without) == len(stack):
            kind = "blocks" if len(whole) == len(self._blocks) else "stack"
        elif follows is None and without == stack[-len(without) :]:
            kind = "last blocks"
        places = {at for name in without for at in absent.intersection(self._blocks[name])}
        # Modules that ran before the first of these blocks, such as the embedding, are cut off as well.
        first = ran.order[without[0]]
        early = [name for name, at in self._outside.items() if absent & at and ran.order.get(name, first) < first]
        if without[0] == stack[0] and kind != "last blocks":
            places |= {at for name in early for at in absent & self._outside[name]}
        else:
            early = []
        return [NoGradient(without[-1], kind, (*early, *without), len(places), follows)]

    def _parts(
        self, whole: Sequence[str], absent: frozenset[int], expected: frozenset[int], ran: Ran
    ) -> list[NoGradient]:
        """Return attentions and feed-forwards without a gradient, and smaller parts of a single block."""
        covers = {
            name: self._cover(name, absent, expected)
            for name, inside in self._blocks.items()
            if name not in whole and ran.has(name) and absent.intersection(inside)
        }
        found = []
        for block, cover in covers.items():
            of_block = next(each for each in self._structure.blocks if each.name == block)
            big = [part for part in (of_block.attention, of_block.feed_forward) if part and self._in(part, cover)]
            if big and all(ran.has(part) for part in big):
                layer, kind = max(big, key=lambda part: len(self._inside(part))), "part"
            elif not big and len(covers) == 1 and all(self._has_siblings(block, part, expected) for part in cover):
                layer = max(cover, key=lambda part: len(self._inside(part)))
                kind = "part" if self._has_layers(layer) else "leaf"
            else:
                continue
            count = sum(len(absent.intersection(self._inside(part))) for part in cover)
            found.append(NoGradient(layer, kind, tuple(cover), count))
        return found

    def _has_siblings(self, block: str, part: str, expected: frozenset[int]) -> bool:
        """Return whether two other blocks have the same part. Experts, which have numbers, do not count."""
        relative = part[len(block) + 1 :]
        if any(name.isdigit() for name in relative.split(".")):
            return False
        others = [name for name in self._blocks if expected & self._inside(f"{name}.{relative}")]
        return len(others) >= 3

    def _has_layers(self, module: str) -> bool:
        """Return whether a module consists of several layers with parameters. A single one may be unused."""
        return len({self._names[at].rpartition(".")[0] for at in self._inside(module)}) > 1

    def _in(self, part: str, cover: Sequence[str]) -> bool:
        return any(part == name or part.startswith(f"{name}.") for name in cover)

    def _before_blocks(self, absent: frozenset[int], expected: frozenset[int], ran: Ran) -> list[NoGradient]:
        """Return modules outside the blocks without a gradient that ran before a block with one."""
        last = max((ran.order[name] for name, at in self._blocks.items() if ran.has(name) and at), default=-1)
        return [
            NoGradient(name, "outside", (name,), len(absent & inside))
            for name, inside in self._outside.items()
            if expected & inside and expected & inside <= absent and ran.order.get(name, last) < last
        ]

    def _most(self, absent: frozenset[int], expected: frozenset[int], ran: Ran) -> list[NoGradient]:
        """Return a finding if half of the weights of a model without blocks get no gradient although they are used."""
        sizes: Callable[[Collection[int]], int] = lambda places: sum(self._parameters[at].numel() for at in places)  # noqa: E731
        if 2 * sizes(absent) < sizes(expected):
            return []
        got = [ran.order[name] for name, at in self._outside.items() if ran.has(name) and expected & at - absent]
        cut = [
            name
            for name, inside in self._outside.items()
            if absent & inside and ran.has(name) and ran.order[name] < max(got, default=-1)
        ]
        if not cut:
            return []
        last = max(cut, key=lambda name: ran.order[name])
        count = sum(len(absent & self._outside[name]) for name in cut)
        return [NoGradient(last, "most", tuple(cut), count)]

    def _cover(self, block: str, absent: frozenset[int], expected: frozenset[int]) -> list[str]:
        """Return the largest modules of a block, and single parameters, that have no gradient at all."""
        covered: list[str] = []
        for at in sorted(absent.intersection(self._blocks[block])):
            steps = self._names[at].split(".")
            for end in range(len(block.split(".")) + 1, len(steps) + 1):
                prefix = ".".join(steps[:end])
                if prefix in covered:
                    break
                inside = {at} if end == len(steps) else expected.intersection(self._inside(prefix))
                if inside <= absent:
                    covered.append(prefix)
                    break
        return covered

    def _inside(self, module: str) -> frozenset[int]:
        return frozenset(
            at for at, name in enumerate(self._names) if name == module or name.startswith(f"{module}.") or not module
        )

    def _direct(self, module: str) -> frozenset[int]:
        parent = "" if module == "the model" else module
        return frozenset(at for at, name in enumerate(self._names) if name.rpartition(".")[0] == parent)
