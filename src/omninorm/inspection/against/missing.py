"""Reports tensors that only one checkpoint has: they are missing in the other, or not comparable for some reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from omninorm.inspection.against.explain import Difference
from omninorm.inspection.against.match import Parts
from omninorm.inspection.against.parts import Part
from omninorm.inspection.against.prepare import NotCompared, Prepared
from omninorm.inspection.against.roles import role_of
from omninorm.inspection.names import place

_TOWER = re.compile(r"vision|visual|audio")
_PREDICTION = re.compile(r"(^|\.)mtp\.|nextn")


def only_in_one(a: Parts, b: Parts, all_a: Prepared, all_b: Prepared) -> tuple[list[Difference], list[NotCompared]]:
    """Return the tensors that are missing from either checkpoint, and those that could not be matched.

    Args:
        a, b: unmatched parts.
        all_a, all_b: the checkpoints.
    """
    differences: list[Difference] = []
    skipped: list[NotCompared] = []
    for here, there, where, other in ((a, b, "A", all_b), (b, a, "B", all_a)):
        lost, unclear = _divide(here, there, other)
        differences += _missing(lost, where)
        for (role, reason), count in unclear.items():
            skipped.append(NotCompared(where, role, count, reason))
    return differences, skipped


def _divide(here: Parts, there: Parts, other: Prepared) -> tuple[list[Part], dict[tuple[str, str], int]]:
    """Return the parts that the other checkpoint lacks, and counts of those that it may have in another form."""
    lost: list[Part] = []
    unclear: dict[tuple[str, str], int] = defaultdict(int)
    rest = {_place_of(key, part) for key, part in there.items()} | other.unreadable
    towers = any(_TOWER.search(name) for name in other.names)
    for key, part in here.items():
        if _TOWER.search(part.name) and not towers:
            unclear[role_of(key), "the other has no vision or audio part"] += 1
        elif _PREDICTION.search(part.name):
            unclear[role_of(key), "it belongs to multi-token prediction"] += 1
        elif _place_of(key, part) in rest:
            unclear[role_of(key), "no rule matches it with a tensor of the other"] += 1
        else:
            lost.append(part)
    return lost, unclear


def _place_of(key: str, part: Part) -> tuple[int | None, bool]:
    return place(key.partition("#")[0], ()).block, part.is_vector


def _missing(parts: list[Part], holder: str) -> Iterator[Difference]:
    groups: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        groups[role_of(part.key)].append(part)
    other = "B" if holder == "A" else "A"
    for group in groups.values():
        named = f"`{group[0].name:.100}`"
        count = len(group)
        norm = place(group[0].name, group[0].tensor.shape).kind in ("gain", "norm bias")
        what = f"{'The norm ' if norm else ''}{named} is" if count == 1 else f"{count} tensors such as {named} are"
        yield Difference("missing", True, f"{what} missing from {other}.", tuple(each.key for each in group))
