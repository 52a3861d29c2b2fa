"""Match the calls of two models: by name, by the common names of checkpoints, by order and shapes, and by content."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from difflib import SequenceMatcher

from omninorm.inspection.against.roles import canonical_names
from omninorm.surgery.difference.calls import Call

Calls = Sequence[Call]


class Matching:
    """The pairs of calls of two models that compute the same thing, by the indices of the calls.

    Args:
        a, b: the calls of each model, as `trace` returns them.

    Attributes:
        pairs: index in a → index in b.
    """

    def __init__(self, a: Calls, b: Calls) -> None:
        self.a, self.b = a, b
        self.pairs: dict[int, int] = {}
        self._taken: set[int] = set()
        self._by_key(lambda calls: {each.key: each for each in calls})
        self._by_key(_by_common_name)
        self._by_order([each for each in a if each.parameters], [each for each in b if each.parameters], _form)
        self._by_content()
        self._by_parent()

    def only(self, in_b: bool = False) -> list[Call]:
        """Return the calls of one model without a counterpart, without those inside of another such call."""
        calls, matched = (self.b, self._taken) if in_b else (self.a, set(self.pairs))
        outermost = [each for each in calls if each.index not in matched and {each.parent} <= {*matched, -1}]
        return [each for each in outermost if each.shape is not None and not is_idle(each)]

    def _pair(self, a: Call, b: Call) -> None:
        free = a.index not in self.pairs and b.index not in self._taken
        if free and a.shape is not None and a.shape == b.shape:
            self.pairs[a.index] = b.index
            self._taken.add(b.index)

    def _by_key(self, keys: Callable[[Calls], dict[tuple[str, int], Call]]) -> None:
        ours, theirs = keys(self.a), keys(self.b)
        for key, call in ours.items():
            if key in theirs:
                self._pair(call, theirs[key])

    def _by_order(self, a: Iterable[Call], b: Iterable[Call], form: Callable[[Call], Hashable]) -> None:
        """Align two sequences by the forms of their members."""
        ours = [each for each in a if each.index not in self.pairs]
        theirs = [each for each in b if each.index not in self._taken]
        forms = [form(each) for each in ours], [form(each) for each in theirs]
        for start, other, count in SequenceMatcher(None, *forms, autojunk=False).get_matching_blocks():
            for offset in range(count):
                self._pair(ours[start + offset], theirs[other + offset])

    def _by_content(self) -> None:
        """Match modules that hold the same matched modules."""
        ours, theirs = self._contents(self.a, set(self.pairs)), self._contents(self.b, self._taken)
        groups: dict[frozenset[int], list[Call]] = defaultdict(list)
        for index, content in theirs.items():
            groups[content].append(self.b[index])
        for index, content in ours.items():
            found = groups.get(frozenset(self.pairs[each] for each in content), [])
            for other in sorted(found, key=lambda each: each.kind != self.a[index].kind):
                self._pair(self.a[index], other)

    @staticmethod
    def _contents(calls: Calls, matched: set[int]) -> dict[int, frozenset[int]]:
        """Return the matched calls with parameters of their own in every other call."""
        found: dict[int, set[int]] = defaultdict(set)
        for each in calls:
            parent = each.parent
            while each.parameters and each.index in matched and parent >= 0:
                found[parent].add(each.index)
                parent = calls[parent].parent
        return {index: frozenset(found[index]) for index in sorted(found) if index not in matched}

    def _by_parent(self) -> None:
        """Match what is left between the same matched neighbours, such as activations, which have no parameters."""
        ours, theirs = _children(self.a), _children(self.b)
        waiting = list(self.pairs.items())
        while waiting:
            a, b = waiting.pop()
            before = len(self.pairs)
            groups = _groups(ours[a], set(self.pairs)), _groups(theirs[b], self._taken)
            for (previous, following), between in groups[0].items():
                other = groups[1].get((self.pairs.get(previous, -1), self.pairs.get(following, -1)), [])
                self._by_order(between, other, lambda each: (each.kind, _form(each)))
                plain = [each for each in between if not (ours[each.index] or each.parameters or is_idle(each))]
                others = [each for each in other if not (theirs[each.index] or each.parameters or is_idle(each))]
                self._by_order(plain, others, lambda each: each.shape)
            waiting += list(self.pairs.items())[before:]


def is_idle(each: Call) -> bool:
    """Return whether a module returns its input in evaluation mode."""
    return each.kind == "Identity" or "Dropout" in each.kind


def _children(calls: Calls) -> dict[int, list[Call]]:
    found: dict[int, list[Call]] = defaultdict(list)
    for each in calls:
        found[each.parent].append(each)
    return found


def _groups(calls: Calls, matched: set[int]) -> dict[tuple[int, int], list[Call]]:
    """Return the unmatched calls by the matched ones before and after them; −1 where there is none."""
    found: dict[tuple[int, int], list[Call]] = {}
    previous = -1
    between: list[Call] = []
    for each in calls:
        if each.index in matched:
            found[previous, each.index] = between
            previous, between = each.index, []
        else:
            between.append(each)
    found[previous, -1] = between
    return found


def _form(each: Call) -> Hashable:
    """Return what a layer and its counterpart have in common, whether its matrix is stored transposed or not."""
    return each.shape, tuple(sorted(tuple(sorted(shape)) for _, shape in each.parameters))


def _by_common_name(calls: Calls) -> dict[tuple[str, int], Call]:
    """Return the calls of modules with parameters by the common name of their first parameter, as in GGUF."""
    tensors = {f"{each.name}.{each.parameters[0][0]}": each for each in calls if each.parameters}
    names = canonical_names(tensors)
    by_module = {each.name: names[name] for name, each in tensors.items()}
    return {(by_module[each.name], each.number): each for each in calls if each.parameters}
