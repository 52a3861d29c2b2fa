"""What an operation did, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import InputError


@dataclass
class Report:
    """changed: name → what was done; refused: name → why not."""

    changed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class Surgery(Report):
    """As `Report`, of an operation that changes weights; `undo` restores them bit for bit.

    error: the largest difference of float64 outputs before and after, over the largest output; see `verify`.
    """

    error: float = 0.0
    _steps: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _places: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict, repr=False)
    _relied: dict[tuple[str, str], nn.Module] = field(default_factory=dict, repr=False)
    _intact: list[Callable[[], bool]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restores every weight, and every module that was replaced.

        Raises:
            InputError: something has changed them since, a later operation or training; nothing is restored then.
        """
        check_intact(self._intact)
        self._intact.clear()
        self._kept.clear()
        self._relied.clear()
        self._places.clear()
        while self._steps:
            self._steps.pop()()

    def finish(self) -> None:
        """Remembers what the operation leaves, so that `undo` can tell whether something has changed it since."""
        for tensor in self._kept.values():
            self._intact.append(partial(_has_values, tensor, fingerprint(tensor)))
        for (name, own), model in self._relied.items():
            parameter = model.get_submodule(name)._parameters.get(own)
            self._intact.append(partial(_has_parameter, model, name, own, parameter))
        for (_, name), place in self._places.items():
            self._intact.append(partial(_stands, place, name, place[name]))

    def later(self, step: Callable[[], None]) -> None:
        """Has a step taken by `undo`, before those that were given earlier."""
        self._steps.append(step)

    def keep(self, parameter: Tensor) -> None:
        """Remembers a parameter's values before they are changed."""
        before = parameter.detach().clone()
        self._kept[id(parameter)] = parameter

        def restore() -> None:
            parameter.data.copy_(before)

        self._steps.append(restore)

    def set_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Puts another parameter in the place of a module's."""
        self._put(module._parameters, name, parameter)
        if parameter is not None:
            self._kept[id(parameter)] = parameter

    def set_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Puts another module in a place."""
        self._put(parent._modules, name, module)

    def rely_on(self, model: nn.Module, name: str, own: str) -> None:
        """Says that `undo` needs the module of this name to have the parameter that the operation leaves it."""
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
    """Raises InputError unless all that an operation has left is as it was left."""
    changed = sum(not is_intact() for is_intact in intact)
    if changed:
        received = f"{changed} of {len(intact)} weights or modules have changed"
        remedy = "undo later operations first; what was trained since has no way back but a checkpoint"
        raise InputError("an operation is undone while what it left is unchanged", received, remedy)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> tuple[object, ...]:
    """Numbers that trained or changed values would hardly have: of the bits, as integers.

    Sums over rows and columns, weighted by their positions, modulo 2⁶⁴.
    """
    if tensor.numel() == 0:
        return tensor.dtype, tuple(tensor.shape)
    values = tensor.detach()
    bits = values.reshape(len(values) if values.ndim > 1 else 1, -1).contiguous().view(_INTEGERS[values.element_size()])
    sums = (bits.sum(dim, dtype=torch.int64) for dim in (0, 1))
    weighted = [int((one * torch.arange(1, len(one) + 1, device=one.device)).sum()) for one in sums]
    return tensor.dtype, tuple(tensor.shape), *weighted
