"""What is compared: studies, each a grid, read from a YAML, TOML or JSON file or taken from a preset.

title: RMSNorm or LayerNorm?
studies:
  - name: norms
    protocol: train
    normalization: [rmsnorm, layernorm]
    placement: [pre]
    depth: [4]
    lr: [0.003]
    seeds: 5
    settings: {d_model: 64, n_heads: 2, steps: 200, seq_len: 64, batch_size: 8}
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from omninorm.config import NORMALIZATIONS, PLACEMENTS, NormConfig, closest
from omninorm.errors import ConfigError
from omninorm.experiments.compare.cells import Cell
from omninorm.thinker import ThinkerConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_CELLS = 10_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Study(_Strict):
    """A grid: every normalization with every placement, depth, rate, value of `vary`, and seed.

    Args:
        name: of the study, without spaces.
        protocol: "init", "ramp", "train" or "speed".
        normalization, placement: names as in NormConfig. `none` goes with `none` alone; other pairs of it are left out.
        depth: numbers of blocks.
        lr: learning rates; of a ramp, the largest. Not for "init" and "speed".
        seeds: how many, from 0 on.
        vary: one further setting and its values, such as {qk_norm: [true, false]}.
        settings: what all cells share: settings of the model, of its training and of NormConfig, flat.
        margin: the smallest difference of the compared value that matters; bits per byte, or the rates' logarithm.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    protocol: Literal["init", "ramp", "train", "speed"]
    normalization: list[str] = Field(default=["rmsnorm"], min_length=1)
    placement: list[str] = Field(default=["pre"], min_length=1)
    depth: list[int] = Field(default=[4], min_length=1)
    lr: list[float] = Field(default=[3e-3], min_length=1)
    seeds: int = Field(default=3, ge=1, le=1000)
    vary: dict[str, list[Any]] = Field(default_factory=dict, max_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    margin: float = Field(default=0.02, gt=0)

    @field_validator("normalization")
    @classmethod
    def _known_norms(cls, names: list[str]) -> list[str]:
        return _known(names, NORMALIZATIONS)

    @field_validator("placement")
    @classmethod
    def _known_placements(cls, names: list[str]) -> list[str]:
        return _known(names, PLACEMENTS)

    @model_validator(mode="after")
    def _has_cells(self) -> Study:
        if any(not values for values in self.vary.values()) or not list(self.pairs()):
            raise ValueError("an empty grid: no normalization goes with a placement here, or `vary` has no values")
        return self

    def pairs(self) -> Iterator[tuple[str, str]]:
        """(normalization, placement): without a norm there is nothing to place."""
        for norm, placement in itertools.product(self.normalization, self.placement):
            if (norm == "none") == (placement == "none"):
                yield norm, placement

    def variants(self) -> Iterator[dict[str, Any]]:
        """What is compared, without seeds: {"normalization", "placement", "depth", "lr" and the varied setting}."""
        name, values = next(iter(self.vary.items()), (None, [None]))
        rates: list[float | None] = [None] if self.protocol in ("init", "speed") else [*self.lr]
        for (norm, placement), depth, lr, value in itertools.product(self.pairs(), self.depth, rates, values):
            varied = {} if name is None else {name: value}
            yield {"normalization": norm, "placement": placement, "depth": depth, "lr": lr, **varied}

    def cell(self, variant: Mapping[str, Any], seed: int, text: str | None, model: str | None) -> Cell:
        """One run of a variant. Of a model of the user's own, the Thinker's settings say nothing and are left out."""
        own = {key: value for key, value in variant.items() if key not in ("normalization", "placement", "depth", "lr")}
        settings = {"seq_len": 128, "checkpoint_every": 10**9, "eval_every": 10**9, **self.settings, **own}
        if model is not None:
            settings = {key: value for key, value in settings.items() if key not in ThinkerConfig.__dataclass_fields__}
        names = set(NormConfig.__dataclass_fields__)
        norm = {name: settings.pop(name) for name in list(settings) if name in names}
        config = NormConfig(variant["normalization"], variant["placement"], **norm)
        return Cell(self.protocol, config, variant["depth"], seed, variant["lr"], settings, text, model)


class ComparePlan(_Strict):
    """A comparison.

    Args:
        title: of its page.
        studies: what is compared.
        claims: what is judged besides, by the ids of `omninorm.experiments.compare.claims`, from the studies they name.
        text: that all studies read: None for the default text, or a path.
        model: "package.module:build", a factory of the user's own; None for the Thinker.
    """

    title: str = "comparison"
    studies: list[Study] = Field(min_length=1)
    claims: list[str] = Field(default_factory=list)
    text: str | None = None
    model: str | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> ComparePlan:
        names = [study.name for study in self.studies]
        if len(set(names)) < len(names):
            raise ValueError(f"studies need names of their own, not {', '.join(names)}")
        for claim in self.claims:
            self._check_claim(claim, names)
        return self

    def _check_claim(self, claim: str, names: list[str]) -> None:
        from omninorm.experiments.compare.claims import CLAIMS  # claims speak of studies, which are defined here

        if claim not in CLAIMS:
            raise ValueError(f"{claim!r} is none of {', '.join(CLAIMS)}")
        wanted = [study["name"] for study in CLAIMS[claim].studies]
        if not set(wanted) & set(names):
            raise ValueError(f"claim {claim} is judged by a study named {' or '.join(wanted)}")

    def cells(self) -> dict[str, Cell]:
        """Every run by its id; what two studies share stands there once.

        Raises:
            ConfigError: a setting is unknown or out of range, or the grid is too large.
        """
        found: dict[str, Cell] = {}
        for study in self.studies:
            for variant, seed in itertools.product(study.variants(), range(study.seeds)):
                cell = study.cell(variant, seed, self.text, self.model)
                cell.plan  # noqa: B018  refuses bad settings
                found[cell.id] = cell
        if len(found) > _MOST_CELLS:
            raise ConfigError(f"a comparison has at most {_MOST_CELLS} runs", str(len(found)), "choose a smaller grid")
        return found


def parse_plan(values: object, source: str) -> ComparePlan:
    """A plan from plain values.

    Raises:
        ConfigError: naming the key that is wrong.
    """
    try:
        return ComparePlan.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the plan"
        if first["type"] == "extra_forbidden":
            known = list((ComparePlan if len(first["loc"]) == 1 else Study).model_fields)
            remedy = f"correct that key{closest(first['loc'][-1], known)}"
            raise ConfigError(
                f"a plan must be valid: its keys here are {', '.join(known)}", f"{place} in {source}", remedy
            ) from None
        said = first["msg"].removeprefix("Value error, ")
        received = f"{place} = {first['input']!r:.80} in {source}: {said}"
        raise ConfigError("a comparison's plan must be valid", received, "correct that key") from None


def read_plan(path: Path) -> ComparePlan:
    """Reads a plan's file: .yaml, .yml, .toml or .json.

    Raises:
        ConfigError: it can't be read, has another ending, or is no plan.
    """
    readers = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise ConfigError(
            f"a plan ends in {', '.join(readers)}", str(path), "rename it, or name a preset with --preset"
        )
    try:
        return parse_plan(readers[path.suffix](path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ConfigError("a plan's file must be readable", f"{path} ({error.strerror})", "check the path") from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        said = " ".join(str(error).split())
        raise ConfigError("a plan's file must be well-formed", f"{path}: {said}", "correct that line") from error


def _known(names: list[str], choices: tuple[str, ...]) -> list[str]:
    for name in names:
        if name not in choices:
            raise ValueError(f"{name!r} is none of {', '.join(choices)}")
    return names
