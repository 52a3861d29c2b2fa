"""`normalized_shape`: reading it, checking it, and bringing the dimensions that it names into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from omninorm.config import LARGEST, check_number
from omninorm.errors import ConfigError, InputError


def read_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """An int or a sequence of ints → a tuple; every dimension must be at least 1.

    Raises:
        ConfigError: empty, not integers, or a dimension below 1.
    """
    given: Any = normalized_shape
    shape = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if not shape or any(isinstance(size, bool) or not isinstance(size, Integral) or size < 1 for size in shape):
        remedy = "pass the width of the features, e.g. 768"
        raise ConfigError("normalized_shape must be one or more integers ≥ 1", repr(normalized_shape), remedy)
    return tuple(map(int, shape))


def flatten_features(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(..., *shape) → (..., d) with d = Π shape.

    Raises:
        InputError: x does not end in `shape`.
    """
    if not isinstance(x, Tensor) or x.shape[-len(shape) :] != shape:
        received = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        remedy = "build the norm for the input's features, or move them to the end"
        raise InputError(f"the input must be a tensor whose shape ends in {shape}", received, remedy)
    return x if len(shape) == 1 else x.reshape(*x.shape[: -len(shape)], math.prod(shape))


def flatten_gain(gain: Tensor | None) -> Tensor | None:
    """A gain or bias of several dimensions as one."""
    return gain if gain is None or gain.ndim == 1 else gain.flatten()


def read_eps(eps: float | None) -> float | None:
    """ε as a float or None, unless no norm could use it.

    Raises:
        ConfigError: negative, NaN, infinite or not a number.
    """
    if eps is not None:
        check_number("eps", eps, at_least=0.0, at_most=LARGEST)
    return eps if eps is None else float(eps)
