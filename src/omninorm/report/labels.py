"""Short names for the rows of a map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from omninorm.report.story import Watched
from omninorm.report.text import plain


def row_labels(known: Watched, axis: str, names: Sequence[str] | None = None) -> list[str]:
    """Return short names for a map's rows: the block's number, or the end of a name outside the blocks.

    Args:
        known: the model.
        axis: of the map.
        names: of the rows; None for all along the axis.
    """
    numbers = {name: str(index) for index, name in enumerate(known.blocks)}
    names = known.names(axis) if names is None else names
    tails = _tails(names)
    if axis == "norm":
        taken: set[int] = set()
        labels = []
        for norm in (norm for norm in known.norms if norm.name in tails):
            repeated = norm.block is not None and norm.block in taken
            labels.append("" if repeated else tails[norm.name] if norm.block is None else str(norm.block))
            taken |= {norm.block} if norm.block is not None else set()
        return labels
    return [numbers.get(name) or tails[name] for name in names]


def _tails(names: Sequence[str]) -> dict[str, str]:
    """Return for each name its shortest unique dotted suffix that is not just a number or a letter."""
    parts = {name: plain(name, 120).split(".") for name in names}
    suffixes = {name: [".".join(each[-count:]) for count in range(1, len(each) + 1)] for name, each in parts.items()}
    counts = Counter(suffix for name in names for suffix in suffixes[name])

    def is_clear(suffix: str) -> bool:
        return counts[suffix] <= 1 and len(suffix) > 2 and not suffix.isdigit()

    return {name: next(filter(is_clear, each), each[-1]) for name, each in suffixes.items()}
