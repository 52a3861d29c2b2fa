"""A cell: one run of a comparison, with everything that decides its outcome."""

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
        protocol: what is measured, "init", "ramp", "train" or "speed".
        norm: how the model is normalized.
        depth: its blocks.
        seed: of weights and batches. Cells that differ in the norm alone see the same batches.
        lr: the learning rate, of a ramp the largest; None for "init" and "speed".
        settings: further ones, flat: those of `Plan.change`.
        text: None for the default text, or the path of a file or folder.
        model: "package.module:build", a factory of the user's own; None for the Thinker.
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
        """A name that can be read, and a hash of all the rest: equal cells have equal ids."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:_DIGITS]
        parts = (self.protocol, self.norm.normalization, self.norm.norm_placement, f"d{self.depth}", f"s{self.seed}")
        return "-".join((*parts, digest))

    @property
    def plan(self) -> Plan:
        """The run that the cell describes.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        rate = {} if self.lr is None else {"lr": self.lr}
        chosen = {**self.settings, **self.norm.to_dict(), "n_layers": self.depth, "seed": self.seed, **rate}
        return Plan(text=self.text).change(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """JSON without further ado; `from_dict` reads it back to an equal cell."""
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
    """What a cell comes to.

    Args:
        outcome: JSON values that are the same whenever the cell is run on the same machine; what is not finite is None.
        clock: JSON values that depend on the clock.
    """

    outcome: Mapping[str, Any]
    clock: Mapping[str, Any]
