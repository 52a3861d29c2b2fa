"""The calls of a model's modules, in order: which were called, by which, and the shapes that they returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.surgery.runs import Run, by_design, call, tensors_of

MAIN = ("logits", "last_hidden_state")


@dataclass(frozen=True)
class Call:
    """A call of a module.

    Args:
        name: the module's name in the model; "" for the model itself.
        number: 0 for the module's first call, 1 for its second.
        index: the number of all calls that began before.
        parent: the index of the call that it was made in; −1 for the model itself.
        last: the index of the last call that began inside of it, or its own.
        kind: the module's class.
        shape: of the main output; None without a floating-point output.
        parameters: the name and shape of each parameter of the module itself.
    """

    name: str
    number: int
    index: int
    parent: int
    last: int
    kind: str
    shape: tuple[int, ...] | None = None
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.number


Enter = Callable[[Call, nn.Module, tuple[Any, ...], dict[str, Any]], None]
Leave = Callable[[Call, nn.Module, Any], None]


def main_of(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the logits, or the last hidden state, or the first output."""
    named = next((outputs[name] for name in MAIN if name in outputs), None)
    return named if named is not None else next(iter(outputs.values()), None)


def outputs_of(value: Any) -> dict[str, Tensor]:
    """Return the floating-point outputs by name or position, without caches and lists of hidden states."""
    found = {name or "output": each for name, each in tensors_of(value) if each.is_floating_point()}
    return {name: each for name, each in found.items() if not by_design(name)}


@contextmanager
def following(model: nn.Module, enter: Enter, leave: Leave) -> Iterator[list[Call]]:
    """Call `enter` and `leave` before and after every call of a module.

    What the modules do while `enter` or `leave` runs is not followed.

    Yields:
        the calls so far, without their shapes.
    """
    calls: list[Call] = []
    open_calls: list[int] = []
    counts: Counter[str] = Counter()
    busy = False

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal busy
            if busy:
                return
            parent = open_calls[-1] if open_calls else -1
            shapes = tuple((own, tuple(each.shape)) for own, each in module.named_parameters(recurse=False))
            calls.append(Call(name, counts[name], len(calls), parent, len(calls), type(module).__name__, None, shapes))
            counts[name] += 1
            open_calls.append(len(calls) - 1)
            busy = True
            try:
                enter(calls[-1], module, args, kwargs)
            finally:
                busy = False

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            leave(calls[open_calls.pop()], module, output)
        finally:
            busy = False

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield calls


def trace(model: nn.Module, run: Run) -> list[Call]:
    """Run a model and return its modules' calls in the order in which they began.

    Raises:
        InputError: the model failed.
    """
    returned: dict[int, tuple[tuple[int, ...] | None, int]] = {}

    def leave(each: Call, module: nn.Module, output: Any) -> None:
        main = main_of(outputs_of(output))
        returned[each.index] = None if main is None else tuple(main.shape), len(calls) - 1

    with following(model, lambda *_: None, leave) as calls:
        repeatable(model, run)
    return [replace(each, shape=returned[each.index][0], last=returned[each.index][1]) for each in calls]


def repeatable(model: nn.Module, run: Run) -> Any:
    """Run a model and leave the generator of random numbers as it was, so that every run draws the same ones."""
    with torch.random.fork_rng(devices=[]):
        return call(model, run)
