"""Run two models whose calls are matched, and measure how far inputs and outputs of every pair are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.surgery.difference.calls import Call, following, main_of, outputs_of, repeatable
from omninorm.surgery.difference.feed import CannotFeedError, Place, feed, named_arguments
from omninorm.surgery.difference.match import Matching
from omninorm.surgery.difference.measure import Rows, between, is_finite, relative
from omninorm.surgery.runs import Run, tensors_of

Tensors = dict[str, Tensor]
Key = tuple[str, int]


@dataclass
class Measured:
    """How far a pair of calls is apart.

    Args:
        a, b: the calls.
        inputs, outputs: the relative differences in the two runs.
        fed: that of the outputs if b's module gets a's inputs; None if it could not be called with them.
        reason: why it could not.
        argument: the argument that differs the most.
        absent: an argument that is None in one of them, and in which.
        nonfinite: "a", "b" or "both" return NaN or infinite values for finite inputs.
        complete: whether both models made the call.
    """

    a: Call
    b: Call
    inputs: float = 0.0
    outputs: float = 0.0
    fed: float | None = None
    reason: str = ""
    argument: str = ""
    absent: str = ""
    nonfinite: str = ""
    complete: bool = False


@dataclass
class _Stored:
    """What a's call received and returned: some rows of each tensor, on the CPU."""

    arguments: Tensors
    missing: set[str]
    outputs: Tensors = field(default_factory=dict)


class PairRun:
    """One input of both models.

    Args:
        a, b: the models, in evaluation mode.
        matching: their calls on this input.
        rows: which rows are stored and compared.
    """

    def __init__(self, a: nn.Module, b: nn.Module, matching: Matching, rows: Rows) -> None:
        self.a, self.b, self.matching = a, b, matching
        self.rows, self.all_rows = rows, Rows(rows.real)
        self.places = Place.of(b), Place.of(a)
        self.theirs = dict(b.named_modules())
        pairs = [Measured(matching.a[x], matching.b[y]) for x, y in sorted(matching.pairs.items())]
        # By name and number: a model that replaces modules in its first run calls others in the next.
        self.found = {each.a.key: each for each in pairs}
        self._by_b = {each.b.key: each for each in pairs}
        self._stored: dict[Key, _Stored] = {}
        self._fed: dict[Key, Tensors] = {}

    def measure(self, runs: tuple[Run, Run]) -> list[Measured]:
        """Run both models and return what was measured, in the order in which a's calls began."""
        with torch.no_grad():
            with following(self.a, self._enter_a, self._leave_a):
                repeatable(self.a, runs[0])
            with following(self.b, self._enter_b, self._leave_b):
                repeatable(self.b, runs[1])
        return [each for each in self.found.values() if each.complete]

    def _enter_a(self, each: Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (found := self.found.get(each.key)) is None:
            return
        self._stored[each.key] = self._keep(named_arguments(module, args, kwargs))
        if not found.a.name and not found.b.name:
            return  # both models received the same input: their own runs are compared
        main = next((each for _, each in tensors_of([args, kwargs])), None)
        if main is None or not is_finite(self.all_rows(main)):
            found.reason = "it received NaN or infinite values" if main is not None else "it received no tensor"
            return
        try:
            self._fed[each.key] = feed(self.theirs[found.b.name], module, args, kwargs, self.places)
        except CannotFeedError as error:
            found.reason = str(error)

    def _leave_a(self, each: Call, module: nn.Module, output: Any) -> None:
        if (found := self.found.get(each.key)) is None:
            return
        outputs = outputs_of(output)
        self._stored[each.key].outputs = self._rows_of(outputs)
        if (fed := self._fed.pop(each.key, None)) is not None:
            ours, theirs = ({name: self.all_rows(x) for name, x in side.items()} for side in (outputs, fed))
            found.fed = between(ours, theirs)
            found.nonfinite = _nonfinite(ours, theirs)

    def _enter_b(self, each: Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = self._by_b.get(each.key)
        if found is not None and (ours := self._stored.get(found.a.key)) is not None:
            theirs = self._keep(named_arguments(module, args, kwargs))
            found.inputs, found.argument = _inputs(ours, theirs)
            found.absent = _absent(ours, theirs)

    def _leave_b(self, each: Call, module: nn.Module, output: Any) -> None:
        found = self._by_b.get(each.key)
        if found is not None and (stored := self._stored.pop(found.a.key, None)) is not None:
            ours, theirs = stored.outputs, self._rows_of(outputs_of(output))
            found.outputs, found.complete = between(ours, theirs), True
            if not found.a.name and not found.b.name:
                found.fed, found.nonfinite = found.outputs, _nonfinite(ours, theirs)

    def _keep(self, arguments: Mapping[str, Any]) -> _Stored:
        tensors = dict(tensors_of(arguments))
        return _Stored(self._rows_of(tensors), {name for name, value in arguments.items() if value is None})

    def _rows_of(self, tensors: Tensors) -> Tensors:
        return {name: self.rows(each.detach()).to("cpu", copy=True) for name, each in tensors.items()}


def _inputs(ours: _Stored, theirs: _Stored) -> tuple[float, str]:
    """Return the largest difference of the inputs, and which of them has it."""
    common = [name for name in ours.arguments if name in theirs.arguments]
    if not common:
        one, other = main_of(ours.arguments), main_of(theirs.arguments)
        return 0.0 if one is None or other is None else relative(one, other), ""
    gaps = {name: relative(ours.arguments[name], theirs.arguments[name]) for name in common}
    largest = max(gaps, key=lambda name: gaps[name])
    return gaps[largest], largest if gaps[largest] else ""


def _absent(ours: _Stored, theirs: _Stored) -> str:
    """Return an argument that is a tensor in one model and None in the other."""
    for which, one, other in (("b", ours, theirs), ("a", theirs, ours)):
        for name in one.arguments:
            if name in other.missing:
                return f"{name}, which is None in {which}"
    return ""


def _nonfinite(ours: Tensors, theirs: Tensors) -> str:
    bad = [not all(map(is_finite, each.values())) for each in (ours, theirs)]
    return ("both" if all(bad) else "a" if bad[0] else "b") if any(bad) else ""
