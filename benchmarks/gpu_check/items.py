"""An item of the check: one measurement with a time limit, and a key under which its result is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Item(NamedTuple):
    """A measurement.

    Args:
        key: its name in the results.
        limit: the seconds after which its process is ended.
        run: a function that returns a result as JSON values; "wrong" in it is a list of sentences about faults.
    """

    key: str
    limit: float
    run: Callable[[], dict[str, Any]]


def sentences(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    """Return at most ten different texts of warnings. They count as faults, because users would see them too."""
    texts = (f"{each.category.__name__}: {' '.join(str(each.message).split())}"[:400] for each in caught)
    return list(dict.fromkeys(texts))[:10]
