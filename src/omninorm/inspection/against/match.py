"""Matches the tensors of two checkpoints by name and by values, also fused with split ones, and stacked experts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch

from omninorm.inspection.against.parts import Part, experts, split
from omninorm.inspection.against.roles import EMBEDDING, FUSED, HEAD, role_of
from omninorm.inspection.names import is_norm_part, place

_MOST_ROLES = 100
_SAMPLE = 1 << 16
_SIMILAR = 0.8  # the least correlation of tensors that are matched by their values
_ROWS_VARY = ("token_embd.weight", "output.weight", "position_embd.weight")

Parts = dict[str, Part]


@dataclass(frozen=True)
class Match:
    """Two matched parts. `how` is the way in which they were matched; unless it is "shape", their shapes are equal."""

    a: Part
    b: Part
    how: str


@dataclass
class Matches:
    """The matched pairs, and the parts that only one of the checkpoints has."""

    pairs: list[Match] = field(default_factory=list)
    only_a: Parts = field(default_factory=dict)
    only_b: Parts = field(default_factory=dict)


def match(a: Parts, b: Parts) -> Matches:
    """Match parts by their common names, and the rest by values."""
    a, b = _single_experts(a, b)
    a, b = _unfused(a, b), _unfused(b, a)
    found = Matches(
        [_oriented(a[key], b[key]) for key in a if key in b],
        {key: part for key, part in a.items() if key not in b},
        {key: part for key, part in b.items() if key not in a},
    )
    _match_tied_head(found, a, b)
    _match_by_values(found)
    return found


def _single_experts(a: Parts, b: Parts) -> tuple[Parts, Parts]:
    """Split stacks of experts in every block in which the checkpoints store experts differently."""
    blocks = {_expert_block(key) for key in a.keys() ^ b.keys()} - {None}

    def apart(parts: Parts) -> Parts:
        found: Parts = {}
        for key, part in parts.items():
            stacked = _expert_block(key) in blocks and "#" not in key and len(part.tensor.shape) in (2, 3)
            found |= {each.key: each for each in (experts(part, key) if stacked else [part])}
        return found

    return apart(a), apart(b)


def _expert_block(key: str) -> str | None:
    return key.rpartition(".ffn_")[0] if "_exps" in key else None


def _unfused(parts: Parts, other: Parts) -> Parts:
    """Split each fused part whose members the other checkpoint stores separately."""
    found: Parts = {}
    for key, part in parts.items():
        members = [] if key in other else _members(key)
        pieces = [other[member] for member in members if member in other]
        sizes = [piece.shape[0] for piece in pieces]
        part = _turned(part) if pieces and sum(sizes) == part.shape[1] != part.shape[0] else part
        fits = members and len(pieces) == len(members) and sum(sizes) == part.shape[0]
        found |= {each.key: each for each in (split(part, members, sizes) if fits else [part])}
    return found


def _members(key: str) -> list[str]:
    for fused, roles in FUSED.items():
        if f".{fused}." in key or key.endswith(f".{fused}"):
            return [key.replace(f".{fused}", f".{role}", 1) for role in roles]
    return []


def _turned(part: Part) -> Part:
    return part if part.is_vector else replace(part, transposed=not part.transposed)


def _oriented(a: Part, b: Part) -> Match:
    how = "same name" if a.name == b.name else "name rules"
    if a.start or b.start or a.stop is not None or b.stop is not None:
        how = "split from a fused tensor"
    elif a.count is not None or b.count is not None:
        how = "one expert of a stack"
    if a.shape == b.shape:
        return Match(a, b, how)
    if a.shape == b.shape[::-1] and not a.is_vector:
        return Match(a, _turned(b), f"{how}, transposed")
    if a.shape[1] == b.shape[1] and role_of(a.key) in _ROWS_VARY:
        rows = min(a.shape[0], b.shape[0])
        return Match(replace(a, stop=a.start + rows), replace(b, stop=b.start + rows), "rows in both")
    return Match(a, b, "shape")


def _match_tied_head(found: Matches, a: Parts, b: Parts) -> None:
    """Compare a head with the other checkpoint's embedding if that checkpoint ties the two."""
    if HEAD in found.only_a and EMBEDDING in b:
        found.pairs.append(replace(_oriented(found.only_a.pop(HEAD), b[EMBEDDING]), how="tied"))
    elif HEAD in found.only_b and EMBEDDING in a:
        found.pairs.append(replace(_oriented(a[EMBEDDING], found.only_b.pop(HEAD)), how="tied"))


def _match_by_values(found: Matches) -> None:
    """Match the remaining parts, role by role: the same part of all blocks together."""
    roles = _roles(found.only_a), _roles(found.only_b)
    if max(map(len, roles)) > _MOST_ROLES:
        return
    scores = [
        (_similarity(ours[min(ours)], theirs[min(theirs)]), a, b)
        for a, ours in roles[0].items()
        for b, theirs in roles[1].items()
        if ours.keys() == theirs.keys() and _same_shapes(ours, theirs)
    ]
    for score, a, b in sorted(scores, key=lambda each: -each[0]):
        if score >= _SIMILAR and a in roles[0] and b in roles[1]:
            _pair_roles(found, roles[0].pop(a), roles[1].pop(b), "values")
    _match_only_candidates(found, *roles)


def _match_only_candidates(
    found: Matches, ours: dict[str, dict[int, Part]], theirs: dict[str, dict[int, Part]]
) -> None:
    """Match norms whose shape and blocks leave only one candidate in either checkpoint."""
    norms = [{role: parts for role, parts in side.items() if is_norm_part(role)} for side in (ours, theirs)]
    for a, parts in list(norms[0].items()):
        fits = [b for b, other in norms[1].items() if parts.keys() == other.keys() and _same_shapes(parts, other)]
        back = [c for c, other in norms[0].items() if fits and _same_shapes(other, norms[1][fits[0]])]
        if len(fits) == 1 and back == [a]:
            _pair_roles(found, parts, norms[1][fits[0]], "the only norm of its shape")


def _pair_roles(found: Matches, ours: dict[int, Part], theirs: dict[int, Part], how: str) -> None:
    for block, part in ours.items():
        other = theirs[block]
        del found.only_a[part.key], found.only_b[other.key]
        found.pairs.append(replace(_oriented(part, other), how=how))


def _roles(parts: Parts) -> dict[str, dict[int, Part]]:
    """Return the parts by role and block; the block of parts outside of blocks is -1."""
    found: dict[str, dict[int, Part]] = defaultdict(dict)
    for key, part in parts.items():
        where = place(key.partition("#")[0], ())
        if "#" not in key:
            found[where.role][-1 if where.block is None else where.block] = part
    return dict(found)


def _same_shapes(ours: dict[int, Part], theirs: dict[int, Part]) -> bool:
    return all(
        part.shape in (theirs[block].shape, theirs[block].shape[::-1])
        for block, part in ours.items()
        if block in theirs
    )


def _similarity(a: Part, b: Part) -> float:
    """Return the |correlation| of a sample of both parts, after transposing b if its shape is a's transposed."""
    b = b if a.shape == b.shape else _turned(b)
    return correlation(a.head(_SAMPLE), b.head(_SAMPLE))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |Pearson's correlation|, or 0 if it is undefined."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = float(a.norm() * b.norm())
    found = abs(float(a @ b)) / size if size > 0.0 else 0.0
    return found if found <= 1.0 + 1e-6 else 0.0
