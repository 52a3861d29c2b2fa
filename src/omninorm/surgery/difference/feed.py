"""Call a module of one model with the arguments that its counterpart in the other model received."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.surgery.difference.calls import outputs_of
from omninorm.surgery.runs import tensors_of

_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)


class CannotFeedError(Exception):
    """The module cannot be called with the other one's arguments; the message is the reason."""


@dataclass(frozen=True)
class Place:
    """The device and dtype of a model's parameters."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Place:
        """Return those of the first floating-point parameter; the CPU and float32 without one."""
        found = next((each for each in model.parameters() if each.is_floating_point()), None)
        return cls(torch.device("cpu"), torch.float32) if found is None else cls(found.device, found.dtype)

    def take(self, x: Tensor, source: Place) -> Tensor:
        """Return a copy of a tensor from another model; one in the dtype of its weights gets the dtype of ours."""
        dtype = self.dtype if x.dtype == source.dtype else x.dtype
        return x.detach().to(self.device, dtype, copy=True)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names of the parameters of the module's forward."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {f"argument {number + 1}": value for number, value in enumerate(args)} | dict(kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found


def feed(module: nn.Module, like: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], places: Any) -> Any:
    """Return the module's outputs for the arguments of a call of another module; they are copied first.

    Args:
        module: the one to call.
        like: the one that received the arguments.
        args, kwargs: the arguments.
        places: (of the module, of the other one).

    Raises:
        CannotFeedError: they are not tensors alone, or mean something else to this module.
    """
    args, kwargs = _as_it_takes_them(module, like, args, kwargs)
    args = tuple(_copied(each, *places) for each in args)
    kwargs = {name: _copied(each, *places) for name, each in kwargs.items()}
    try:
        with torch.random.fork_rng(devices=[]):  # both modules draw the same random numbers
            return outputs_of(module(*args, **kwargs))
    except Exception as error:  # whatever the module makes of them
        said = f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
        raise CannotFeedError(f"it failed on the other model's input ({said})") from error


def _as_it_takes_them(
    module: nn.Module, like: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if type(module) is type(like):
        return args, kwargs
    tensors = [each for _, each in tensors_of([args, kwargs])]
    given = [each for each in (*args, *kwargs.values()) if each is not None]
    if len(tensors) == len(given) == 1:
        return (tensors[0],), {}
    named = named_arguments(like, args, kwargs)
    if all(name in argument_names(module) for name in named):
        return (), named
    raise CannotFeedError(f"{type(module).__name__} takes other arguments than {type(like).__name__}")


def argument_names(module: nn.Module) -> list[str]:
    """Return the names of a module's arguments; none if they cannot be determined."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        return [each.name for each in inspect.signature(module.forward).parameters.values() if each.kind in kinds]
    except (TypeError, ValueError):
        return []


def _copied(value: Any, place: Place, source: Place) -> Any:
    """Return a copy, so that a module that changes its arguments, such as a cache, changes only the copy."""
    if isinstance(value, Tensor):
        return place.take(value, source)
    if isinstance(value, _PLAIN):
        return value
    if type(value) in (tuple, list):
        return type(value)(_copied(each, place, source) for each in value)
    if type(value) is dict:
        return {key: _copied(each, place, source) for key, each in value.items()}
    if isinstance(value, nn.Module) or callable(value):
        raise CannotFeedError("one of its arguments is a function of the other model")
    try:
        return copy.deepcopy(value)
    except Exception as error:  # whatever the class forbids
        raise CannotFeedError(f"one of its arguments, a {type(value).__name__}, cannot be copied") from error
