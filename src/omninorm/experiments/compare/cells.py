"""Cells: a cell is one run of a comparison, with everything that determines its outcome."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omninorm.config import NormConfig
from omninorm.experiments.runs import Plan

_DIGITS = 10


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        protocol: the kind of measurement, "init", "ramp", "train" or "speed".
        norm: the model's norms.
        depth: the number of blocks.
        seed: the seed for weights and batches. Cells that differ only in the norm have the same batches.
        lr: the learning rate (for a ramp the largest); None for "init" and "speed".
        settings: further settings in one flat dictionary, as for `Plan.change`.
        text: the path of a file or folder; None for the default text.
        model: "package.module:build", a user's own model factory; None for the Thinker.
    """

    protocol: str
    norm: NormConfig
    depth: int
    seed: int
    lr: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    model: str | None = None

    @property
    def id(self) -> str:
        """Readable name with a hash of all settings, so that equal cells have equal ids."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:_DIGITS]
        parts = (self.protocol, self.norm.normalization, self.norm.norm_placement, f"d{self.depth}", f"s{self.seed}")
        return "-".join((*parts, digest))

    @property
    def plan(self) -> Plan:
        """The training plan of the cell.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        rate = {} if self.lr is None else {"lr": self.lr}
        chosen = {**self.settings, **self.norm.to_dict(), "n_layers": self.depth, "seed": self.seed, **rate}
        return Plan(text=self.text).change(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values, from which `from_dict` builds an equal cell."""
        return {
            "protocol": self.protocol,
            "norm": self.norm.to_dict(),
            "depth": self.depth,
            "seed": self.seed,
            "lr": self.lr,
            "settings": dict(sorted(self.settings.items())),
            "text": self.text,
            "model": self.model,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        return cls(**{**values, "norm": NormConfig.from_dict(values["norm"])})


@dataclass(frozen=True)
class Measurement:
    """The result of a cell.

    Args:
        outcome: JSON values that are the same in every run on the same machine, with None for non-finite numbers.
        clock: JSON values that depend on the clock, such as durations.
    """

    outcome: Mapping[str, Any]
    clock: Mapping[str, Any]
