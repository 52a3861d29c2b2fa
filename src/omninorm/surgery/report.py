"""Reports of operations: what was changed and refused, and how to undo it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import InputError
from omninorm.surgery.proof import Proof


@dataclass(repr=False)
class Report:
    """The result of an operation. `print(report)` gives one line, `print(report.table())` every name.

    Args:
        changed: name → what was done.
        refused: name → why not.
    """

    changed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def counts(self) -> list[str]:
        """Return what was changed, counted, for the one-line summary."""
        raise NotImplementedError

    def table(self) -> str:
        """Return a line for each name, with what was done or why not."""
        rows = [("changed", *each) for each in self.changed.items()]
        rows += [("refused", *each) for each in self.refused.items()]
        width = max((len(name) for _, name, _ in rows), default=0)
        return "\n".join(f"{kind}  {name:{width}}  {what}" for kind, name, what in rows)

    def __str__(self) -> str:
        return ", ".join((*self.counts(), f"{len(self.refused)} refused"))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"


# How entries of `changed` begin that are about weights, not norms.
_ON_WEIGHTS = ("mean removed", "rotated")


@dataclass(repr=False)
class Surgery(Report):
    """The result of an operation that changes weights; `undo` restores them bit for bit.

    Args:
        error: the largest difference of float64 outputs before and after, relative to the largest output; see `verify`.
        operation: "folded", "centered", "rotated" or "canceled".
        device: where the outputs were compared.
        proof: which outputs and runs were compared, and what the runs covered.
    """

    error: float = 0.0
    operation: str = "folded"
    device: str = "cpu"
    proof: Proof = field(default_factory=Proof)
    _steps: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _places: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict, repr=False)
    _relied: dict[tuple[str, str], nn.Module] = field(default_factory=dict, repr=False)
    _intact: list[Callable[[], bool]] = field(default_factory=list, repr=False)

    def counts(self) -> list[str]:
        weights = [name for name, what in self.changed.items() if what.startswith(_ON_WEIGHTS)]
        norms = len(self.changed) - len(weights)
        rotated = self.operation == "rotated"
        counted = [numbered(norms, "norm", "folded" if rotated else self.operation)] if norms or not rotated else []
        if weights or rotated:
            counted.append(numbered(len(weights), "weight", self.operation))
        where = "" if self.device == "cpu" else f" on {self.device}"
        return (
            [*counted, f"maximum relative difference {self.error:.0e} in float64{where}"] if self.changed else counted
        )

    def undo(self) -> None:
        """Restore every weight, and every module that was replaced.

        Raises:
            InputError: a later operation or training has changed them since; then nothing is restored.
        """
        check_intact(self._intact)
        self._intact.clear()
        self._kept.clear()
        self._relied.clear()
        self._places.clear()
        while self._steps:
            self._steps.pop()()

    def finish(self) -> None:
        """Record the final state, so that `undo` can detect later changes."""
        for tensor in self._kept.values():
            self._intact.append(partial(_has_values, tensor, fingerprint(tensor)))
        for (name, own), model in self._relied.items():
            parameter = model.get_submodule(name)._parameters.get(own)
            self._intact.append(partial(_has_parameter, model, name, own, parameter))
        for (_, name), place in self._places.items():
            self._intact.append(partial(_stands, place, name, place[name]))

    def later(self, step: Callable[[], None]) -> None:
        """Add a step for `undo`; later steps run first."""
        self._steps.append(step)

    def keep(self, parameter: Tensor) -> None:
        """Save a parameter's values before they are changed."""
        before = parameter.detach().clone()
        self._kept[id(parameter)] = parameter

        def restore() -> None:
            parameter.data.copy_(before)

        self._steps.append(restore)

    def set_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Replace a module's parameter."""
        self._put(module._parameters, name, parameter)
        if parameter is not None:
            self._kept[id(parameter)] = parameter

    def set_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Replace a submodule."""
        self._put(parent._modules, name, module)

    def rely_on(self, model: nn.Module, name: str, own: str) -> None:
        """Require for `undo` that the module of this name still has the same parameter."""
        self._relied[name, own] = model

    def _put(self, place: dict[str, Any], name: str, value: object) -> None:
        before = place.get(name)
        place[name] = value
        self._places[id(place), name] = place
        self._steps.append(lambda: place.__setitem__(name, before))


def _has_values(tensor: Tensor, left: object) -> bool:
    return fingerprint(tensor) == left


def _has_parameter(model: nn.Module, name: str, own: str, parameter: object) -> bool:
    try:
        return model.get_submodule(name)._parameters.get(own) is parameter
    except AttributeError:  # no such module any more
        return False


def _stands(place: dict[str, Any], name: str, left: object) -> bool:
    return place.get(name) is left


def check_intact(intact: Sequence[Callable[[], bool]]) -> None:
    """Raise InputError if a tensor or module has changed since the operation."""
    changed = sum(not is_intact() for is_intact in intact)
    if changed:
        problem = f"Cannot undo: {changed} of {len(intact)} tensors or modules changed after this operation"
        raise InputError(problem, "", "undo later operations first; to revert training, load a checkpoint")


def check_model(model: object) -> None:
    """Raise InputError for what is not a module."""
    if not isinstance(model, nn.Module):
        raise InputError("model must be a torch.nn.Module", f"a {type(model).__name__}", "pass the model itself")


def numbered(count: int, noun: str, done: str) -> str:
    """Return a counted participle, such as "1 norm swapped" or "9 norms swapped"."""
    return f"{count} {noun}{'' if count == 1 else 's'} {done}"


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> tuple[object, ...]:
    """Return checksums of the tensor's bits, which training would change.

    They are sums over rows and columns, weighted by their positions, modulo 2⁶⁴.
    """
    if tensor.numel() == 0:
        return tensor.dtype, tuple(tensor.shape)
    values = tensor.detach()
    bits = values.reshape(len(values) if values.ndim > 1 else 1, -1).contiguous().view(_INTEGERS[values.element_size()])
    sums = (bits.sum(dim, dtype=torch.int64) for dim in (0, 1))
    weighted = [int((one * torch.arange(1, len(one) + 1, device=one.device)).sum()) for one in sums]
    return tensor.dtype, tuple(tensor.shape), *weighted
