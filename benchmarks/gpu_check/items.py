"""An item of the check: one measurement with a time limit, and a key under which its result is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Item(NamedTuple):
    """A measurement.

    key: its name in the results; limit: the seconds after which its process is ended; run: returns a result as JSON
    values, with "wrong" (a list of sentences) where something is not as it must be.
    """

    key: str
    limit: float
    run: Callable[[], dict[str, Any]]


def sentences(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    """Return the texts of warnings, each once, and ten at most. They are findings: users would see them too."""
    texts = (f"{each.category.__name__}: {' '.join(str(each.message).split())}"[:400] for each in caught)
    return list(dict.fromkeys(texts))[:10]
