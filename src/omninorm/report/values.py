"""Convert a record's values to the types they should have. The file may come from anywhere and is not trusted."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping
from typing import Any

from omninorm.record.signals import SIGNALS, Limit
from omninorm.report.story import Norm, Values, Watched

_SPELLED = ("nan", "inf", "-inf")
LARGEST = 1e300
"""Larger values are drawn as not finite: rounding or scaling them could overflow."""
MAX_NAMES = 5000
"""Most names along an axis that are read: far more than any model has layers."""


class DamageError(ValueError):
    """A line of a record that `Record` cannot have written."""


def parse(line: bytes) -> dict[str, Any]:
    """Parse the event of one line.

    Raises:
        DamageError: it is not JSON, or not an event.
    """
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DamageError(str(error)) from error
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        raise DamageError("no kind")
    count(event.get("step"))
    return event


def count(value: Any) -> int:
    """Return a whole number ≥ 0; raise DamageError for anything else."""
    # JavaScript numbers are exact up to 2^53, and no run has more steps.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise DamageError("no count")
    return value


def number(value: Any) -> float | None:
    """Return a float, also from "nan", "inf" or "-inf"; None for anything else."""
    if isinstance(value, str):
        return float(value) if value in _SPELLED else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def numbers(values: Any) -> Values:
    """Return a list of floats, with None for anything else. A list of plain numbers is returned unchanged."""
    if not isinstance(values, list):
        raise DamageError("no list")
    try:
        array("d", values)
    except (TypeError, OverflowError):
        return [number(value) for value in values]
    return values


def text(value: Any, otherwise: str = "") -> str:
    return value if isinstance(value, str) else otherwise


def text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def texts(value: Any) -> list[str]:
    return [text(each, "?") for each in value[:MAX_NAMES]] if isinstance(value, list) else []


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def watched(event: Mapping[str, Any]) -> Watched:
    """Read the event "watch", ignoring values that are missing or of the wrong type."""
    return Watched(
        step=count(event["step"]),
        every=_count_or_none(event.get("every")),
        world_size=_count_or_none(event.get("world_size")) or 1,
        started=text_or_none(event.get("started")),
        versions={name: text(value, "?") for name, value in mapping(event.get("versions")).items()},
        model=text(event.get("model")),
        parameters=_count_or_none(event.get("parameters")),
        blocks=texts(event.get("blocks")),
        norms=[_norm(mapping(each)) for each in _listed(event.get("norms"))],
        groups=texts(event.get("groups")),
        optimizer=text_or_none(event.get("optimizer")),
        adam_eps=number(event.get("adam_eps")),
        name=text(event.get("name")),
        config=mapping(event.get("config")),
        limits=[limit for each in _listed(event.get("limits")) if (limit := _limit(mapping(each)))],
    )


def _listed(value: Any) -> list[Any]:
    return value[:MAX_NAMES] if isinstance(value, list) else []


def _limit(stored: Mapping[str, Any]) -> Limit | None:
    """Return a limit on a known signal; None unless it has a finite value."""
    warn, fail = _finite(stored.get("warn")), _finite(stored.get("fail"))
    signal = text(stored.get("signal"))
    if signal not in SIGNALS or (warn is None and fail is None):
        return None
    below, words = stored.get("below") is True, ("rule", "condition", "dtype")
    rule, condition, dtype = (text(stored.get(word)) for word in words)
    return Limit(signal, rule, warn, fail, below, condition, dtype)


def _finite(value: Any) -> float | None:
    """Return a number that can be drawn, or None."""
    found = number(value)
    return found if found is not None and abs(found) <= LARGEST else None


def _norm(stored: Mapping[str, Any]) -> Norm:
    return Norm(
        name=text(stored.get("name"), "?"),
        kind=text(stored.get("kind")),
        eps=number(stored.get("eps")),
        block=_count_or_none(stored.get("block")),
        frozen=stored.get("frozen") is True,
        ours=stored.get("ours") is True,
    )


def _count_or_none(value: Any) -> int | None:
    try:
        return count(value)
    except DamageError:
        return None
