"""Finds vector spaces that a model could rotate, by following features from the parameters that write them.

A space is a set of vectors whose features keep their meaning: what some parameters write, what is added to it, and what
other parameters read from it. Every element of such a tensor is marked with its feature. Marks move along with views,
copies and indexing. Sums join the spaces of their terms. Whatever would not commute with a rotation breaks the features
that it touches: activations, products with vectors, attention scores, outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

OTHERS = "something else"
Slot = tuple[str, str, int]
"""A dimension of a parameter: (module, name in the module, dimension)."""


@dataclass(eq=False)
class Space:
    """Features that some parameters write and others read.

    Args:
        name: the parameter that writes it first.
        number: how many spaces were found before it.
        slots: dimensions of parameters that run over the features → the feature of each index.
        writers: those slots that write.
        norms: norms of vectors of the space → the features that they normalize.
        rows: sets of features that are normalized, scaled or read together.
        mixed: sets of features whose vectors are averaged over tokens, as heads' values are.
        broken: features → why they cannot be rotated, such as an operation that does not commute with a rotation.
        into: the space that this one has become part of.
    """

    name: str
    number: int
    slots: dict[Slot, tuple[int, ...]] = field(default_factory=dict)
    writers: dict[Slot, int] = field(default_factory=dict)  # in order, with the parameter's number of dimensions
    norms: dict[str, frozenset[int]] = field(default_factory=dict)
    rows: set[frozenset[int]] = field(default_factory=set)
    mixed: set[frozenset[int]] = field(default_factory=set)
    broken: dict[frozenset[int], str] = field(default_factory=dict)
    into: Space | None = None

    def root(self) -> Space:
        """Return the space that this one is part of now."""
        return self if self.into is None else self.into.root()

    def why_not(self, features: Iterable[int]) -> str:
        """Return why some of these features cannot be rotated, or an empty text."""
        chosen = frozenset(features)
        return next((why for broken, why in self.broken.items() if not broken.isdisjoint(chosen)), "")

    def attach(self, slot: Slot, row: tuple[int, ...]) -> None:
        """Add a dimension of a parameter, whose features must be the same each time."""
        if self.slots.setdefault(slot, row) != row:
            both = frozenset((*row, *self.slots[slot]))
            self.broken.setdefault(both, f"{slot_name(slot)} takes different features of it at different times")

    def join(self, other: Space) -> None:
        """Make the other space part of this one."""
        other.into = self
        for slot, row in other.slots.items():
            self.attach(slot, row)
        self.writers |= other.writers
        for norm, features in other.norms.items():
            self.norms[norm] = self.norms.get(norm, frozenset()) | features
        self.rows |= other.rows
        self.mixed |= other.mixed
        self.broken = other.broken | self.broken

    def blocks(self) -> list[list[int]]:
        """Return the finest sets of features that are always used together, each in ascending order."""
        features = sorted({feature for row in self.slots.values() for feature in row})
        rows = list(self.rows | self.mixed)
        found: dict[tuple[bool, ...], list[int]] = {}
        for feature in features:
            found.setdefault(tuple(feature in row for row in rows), []).append(feature)
        return list(found.values())


@dataclass(frozen=True)
class Mark:
    """What a tensor's elements are.

    Args:
        space: of all of them.
        features: of each, in the tensor's shape.
        sources: the modules, or loose parameters, whose outputs the vectors are sums of, and OTHERS.
    """

    space: Space
    features: Tensor
    sources: frozenset[str]


@dataclass
class Spaces:
    """The spaces of a model.

    Args:
        spaces: all of them.
        uses: a module that writes → what uses its vectors before they are added to others.
        norm_sources: norm → the modules whose outputs its input is a sum of, and OTHERS if something else computes it.
    """

    spaces: list[Space] = field(default_factory=list)
    uses: dict[str, set[str]] = field(default_factory=dict)
    norm_sources: dict[str, set[str]] = field(default_factory=dict)


def slot_name(slot: Slot) -> str:
    """Return the module, or the parameter if its name says more."""
    module, own, _ = slot
    return module if own == "weight" and module else f"{module}.{own}".lstrip(".")


def rows_of(features: Tensor) -> list[tuple[int, ...]]:
    """Return the different rows of a tensor of features."""
    for dim in range(features.ndim - 1):
        if features.stride(dim) == 0 and features.shape[dim]:
            features = features.narrow(dim, 0, 1)
    if not features.numel():
        return []
    flat = features.reshape(-1, features.shape[-1] if features.ndim else 1)
    if bool((flat == flat[0]).all()):
        return [tuple(flat[0].tolist())]
    return [tuple(row) for row in torch.unique(flat, dim=0).tolist()]
