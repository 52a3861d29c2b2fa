"""Evidence for claims: the outcomes of a comparison's runs, by study and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omninorm.experiments.compare.plan import ComparePlan, Study
from omninorm.experiments.compare.store import Store

Outcome = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A configuration of a study with its outcomes by seed; `clocks` has the values that depend on the clock."""

    variant: Mapping[str, Any]
    outcomes: Mapping[int, Outcome]
    clocks: Mapping[int, Outcome]

    @property
    def label(self) -> str:
        """The norm, placement and varied setting as text."""
        names = ("normalization", "placement")
        own = [f"{name}={value}" for name, value in self.variant.items() if name not in (*names, "depth", "lr")]
        return " ".join([*(str(self.variant[name]) for name in names), *own])


@dataclass(frozen=True)
class Evidence:
    """The rows of every study, and the unigram baseline of the held-out text in bits per byte."""

    studies: Mapping[str, Study]
    found: Mapping[str, tuple[Row, ...]]
    unigram: float

    def rows(self, study: str, **where: Any) -> tuple[Row, ...]:
        """Return a study's rows whose variant has these values; an empty tuple if the comparison lacks the study."""
        rows = self.found.get(study, ())
        return tuple(row for row in rows if all(row.variant.get(key) == value for key, value in where.items()))

    def values(self, study: str, name: str) -> list[Any]:
        """Return a study's values of depth, lr, …, in the plan's order."""
        return list(dict.fromkeys(row.variant.get(name) for row in self.rows(study)))


def gather(plan: ComparePlan, store: Store, unigram: float) -> Evidence:
    """Read every outcome of a comparison."""
    found = {
        study.name: tuple(_row(study, variant, plan, store) for variant in study.variants()) for study in plan.studies
    }
    return Evidence({study.name: study for study in plan.studies}, found, unigram)


def _row(study: Study, variant: Mapping[str, Any], plan: ComparePlan, store: Store) -> Row:
    outcomes, clocks = {}, {}
    for seed in range(study.seeds):
        cell = study.cell(variant, seed, plan.text, plan.model)
        outcome = store.outcome(cell)
        if outcome is not None:
            outcomes[seed], clocks[seed] = outcome, store.clock(cell)
    return Row(variant, outcomes, clocks)
