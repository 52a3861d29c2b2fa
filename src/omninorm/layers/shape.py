"""Reading and checking the arguments that the norm modules share."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from omninorm.config import LARGEST, closest, python_number, read_number
from omninorm.errors import ConfigError, InputError

_Init = TypeVar("_Init", bound=Callable[..., None])


def explain_arguments(init: _Init) -> _Init:
    """Decorate a constructor so that an unknown keyword argument raises a ConfigError that lists the known ones."""
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if unknown := [name for name in kwargs if name not in known]:
            name = type(self).__name__
            if unknown[0] == "bias":
                remedy = "use LayerNorm if you need a bias, otherwise leave it out"
                raise ConfigError(f"{name} has no argument bias", f"bias={kwargs['bias']!r:.40}", remedy)
            remedy = f"correct or remove it{closest(unknown[0], known)}"
            raise ConfigError(f"{name} takes the arguments {', '.join(known)}", ", ".join(unknown), remedy)
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


def read_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return an int or a sequence of ints, each at least 1, as a tuple.

    Raises:
        ConfigError: it is empty, not of integers, or has a dimension below 1.
    """
    given: Any = normalized_shape
    shape = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    shape = tuple(map(python_number, shape))
    if not shape or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
        remedy = "pass the number of features, e.g. 768"
        raise ConfigError("normalized_shape must be one or more integers ≥ 1", f"{normalized_shape!r:.40}", remedy)
    return tuple(map(int, shape))


def flatten_features(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape (..., *shape) to (..., d) with d = Π shape.

    Raises:
        InputError: x does not end in `shape`.
    """
    if not isinstance(x, Tensor) or x.shape[-len(shape) :] != shape:
        received = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        remedy = "build the norm for the input's number of features, or move the features to the last dimension"
        raise InputError(f"The input must be a tensor whose shape ends in {_shown(shape)}", received, remedy)
    return x if len(shape) == 1 else x.reshape(*x.shape[: -len(shape)], math.prod(shape))


def flatten_gain(gain: Tensor | None) -> Tensor | None:
    """Return a gain or bias flattened to one dimension; None stays None."""
    return gain if gain is None or gain.ndim == 1 else gain.flatten()


def read_eps(eps: float | None) -> float | None:
    """Return ε as a float, or None.

    Raises:
        ConfigError: it is negative, NaN, infinite, or not a number.
    """
    return None if eps is None else read_number("eps", eps, at_least=0.0, at_most=LARGEST)


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if len(shape) == 1 else str(shape)
