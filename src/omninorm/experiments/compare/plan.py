"""Plans of comparisons. A plan has studies, each of them a grid of runs; it is a YAML, TOML or JSON file, or a preset.

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
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from omninorm.config import NORMALIZATIONS, PLACEMENTS, NormConfig, closest
from omninorm.errors import ConfigError
from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.faults import explain
from omninorm.experiments.memory import MOST_BLOCKS
from omninorm.memory import memory_limit
from omninorm.thinker import ThinkerConfig
from omninorm.thinker.sizes import count_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_CELLS = 10_000
_MOST_VALUES = 1000  # values in one list of a plan
# Limits in bytes; a plan has a few hundred. PyYAML reads only about 30 kB per second, so YAML has a lower limit.
_LARGEST_FILE, _LARGEST_YAML = 2**20, 2**15
_DEEPEST_BRACKETS = 100
_MOST_NODES = 20_000  # values in a YAML file after its aliases are expanded
_DEEPEST = 20
_LONGEST_TEXT, _LONGEST_LIST = 200, 20  # limits for a setting
_LARGEST_INTEGER = 2**63


Depth = Annotated[int, Field(ge=1, le=MOST_BLOCKS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Study(_Strict):
    """A grid: every normalization with every placement, depth, learning rate, value of `vary`, and seed.

    Args:
        name: the study's name, without spaces.
        protocol: "init", "ramp", "train" or "speed".
        normalization, placement: names as in NormConfig. `none` is combined only with `none`.
        depth: numbers of blocks.
        lr: learning rates; for a ramp, the largest ones. "init" and "speed" do not use them.
        seeds: the number of seeds, which start at 0.
        vary: one further setting and its values, such as {qk_norm: [true, false]}.
        settings: settings of the model, its training and NormConfig that all runs share, in one flat dictionary.
        margin: the smallest difference that matters, in bits per byte, or in ln(learning rate) for ramps.
    """

    name: str = Field(pattern=r"^[\w.-]+$", max_length=100)
    protocol: Literal["init", "ramp", "train", "speed"]
    normalization: list[str] = Field(default=["rmsnorm"], min_length=1, max_length=_MOST_VALUES)
    placement: list[str] = Field(default=["pre"], min_length=1, max_length=_MOST_VALUES)
    depth: list[Depth] = Field(default=[4], min_length=1, max_length=_MOST_VALUES)
    lr: list[float] = Field(default=[3e-3], min_length=1, max_length=_MOST_VALUES)
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

    @field_validator("settings")
    @classmethod
    def _plain_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        _check_plain(settings)
        return settings

    @field_validator("vary")
    @classmethod
    def _plain_values(cls, vary: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, values in vary.items():
            for value in values:
                _check_plain({name: value})
        return vary

    @model_validator(mode="after")
    def _has_cells(self) -> Study:
        for name, values in self.vary.items():
            if not 0 < len(values) <= _MOST_VALUES:
                raise ValueError(f"`vary` must name 1 to {_MOST_VALUES} values of {name}, not {len(values)}")
        if not any(True for _ in self.pairs()):
            raise ValueError("an empty grid, because `none` goes with `none` only: add a placement or a normalization")
        return self

    def count(self) -> int:
        """Return the number of runs, without expanding the grid."""
        pairs = sum(1 for _ in self.pairs())
        rates = 1 if self.protocol in ("init", "speed") else len(self.lr)
        return pairs * len(self.depth) * rates * math.prod(map(len, self.vary.values())) * self.seeds

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield (normalization, placement); `none` is combined only with `none`."""
        for norm, placement in itertools.product(self.normalization, self.placement):
            if (norm == "none") == (placement == "none"):
                yield norm, placement

    def variants(self) -> Iterator[dict[str, Any]]:
        """Yield the variants: dictionaries with normalization, placement, depth, lr and the varied setting."""
        name, values = next(iter(self.vary.items()), (None, [None]))
        rates: list[float | None] = [None] if self.protocol in ("init", "speed") else [*self.lr]
        for (norm, placement), depth, lr, value in itertools.product(self.pairs(), self.depth, rates, values):
            varied = {} if name is None else {name: value}
            yield {"normalization": norm, "placement": placement, "depth": depth, "lr": lr, **varied}

    def cell(self, variant: Mapping[str, Any], seed: int, text: str | None, model: str | None) -> Cell:
        """Return one run of a variant. The Thinker's settings are left out for a user's own model."""
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
        title: the title of the report page.
        studies: the grids to run.
        claims: the ids of claims in `omninorm.experiments.compare.claims` to judge from the studies that they name.
        text: the path of the training text; None for the default text.
        model: "package.module:build", a user's own model factory; None for the Thinker.
    """

    title: str = Field(default="comparison", max_length=1000)
    studies: list[Study] = Field(min_length=1, max_length=_MOST_VALUES)
    claims: list[str] = Field(default_factory=list, max_length=_MOST_VALUES)
    text: str | None = Field(default=None, max_length=4096)
    model: str | None = Field(default=None, max_length=4096)

    @field_validator("text", "model")
    @classmethod
    def _no_nul(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError("a path or name can't contain a NUL character")
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> ComparePlan:
        names = [study.name for study in self.studies]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two studies are named {twice}: give each its own name")
        for claim in self.claims:
            self._check_claim(claim, names)
        return self

    def _check_claim(self, claim: str, names: list[str]) -> None:
        from omninorm.experiments.compare.claims import CLAIMS  # claims import studies, which are defined here

        if claim not in CLAIMS:
            raise ValueError(f"{claim!r:.80} is not one of {', '.join(CLAIMS)}")
        needed = [study["name"] for study in CLAIMS[claim].studies]
        if not set(needed) & set(names):
            raise ValueError(f"claim {claim} needs a study named {' or '.join(needed)}")

    def cells(self) -> dict[str, Cell]:
        """Return all runs by id; a run that two studies share is included once.

        Raises:
            ConfigError: a setting is unknown or out of range, or the grid is too large.
        """
        runs = sum(study.count() for study in self.studies)
        if runs > _MOST_CELLS:
            received = f"{runs:,}" if runs < _LARGEST_INTEGER else "far more"
            raise ConfigError(f"A comparison can have at most {_MOST_CELLS:,} runs", received, "choose a smaller grid")
        found: dict[str, Cell] = {}
        for study in self.studies:
            for variant, seed in itertools.product(study.variants(), range(study.seeds)):
                cell = study.cell(variant, seed, self.text, self.model)
                _ = cell.plan  # checks the settings
                found[cell.id] = cell
        return found


def parse_plan(values: object, source: str) -> ComparePlan:
    """Build a plan from plain values.

    Raises:
        ConfigError: the plan is invalid; the message names the key.

    Example:
        >>> study = {"name": "norms", "protocol": "train", "normalization": ["rmsnorm", "layernorm"],
        ...          "placement": ["pre"], "depth": [2, 4], "lr": [0.003], "seeds": 5}
        >>> len(parse_plan({"title": "RMSNorm or LayerNorm?", "studies": [study]}, "an example").cells())
        20
    """
    try:
        return ComparePlan.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        if first["type"] == "extra_forbidden":
            known = list((ComparePlan if len(first["loc"]) == 1 else Study).model_fields)
            remedy = f"use one of {', '.join(known)}{closest(str(first['loc'][-1])[:100], known)}"
            raise ConfigError(f"Unknown key {place} in the plan {source}", "", remedy) from None
        if first["type"] == "missing":
            raise ConfigError(f"{place} is missing from the plan {source}", "", f"add the key {place}") from None
        if not first["loc"] and first["type"] == "model_type":
            remedy = "write the studies below the key studies"
            raise ConfigError(f"The plan {source} must be a mapping", _shown(first["input"]), remedy) from None
        reason = first["msg"].removeprefix("Value error, ")[:300]
        must = re.sub(r"^be a valid (?=[aeiou])", "be an ", reason.removeprefix("Input should "))
        what = (
            f"must {must.replace('be a valid ', 'be a ')}" if reason.startswith("Input") else f"is not valid: {reason}"
        )
        subject, key = (f"{place} in the plan {source}", "this key") if place else (f"The plan {source}", "it")
        raise ConfigError(f"{subject} {what}", _shown(first["input"]), f"correct {key}") from None


def read_plan(path: Path) -> ComparePlan:
    """Read a plan from a .yaml, .yml, .toml or .json file.

    Raises:
        ConfigError: the file can't be read, is too large, has another suffix, or is not a plan.
    """
    readers = {".yaml": _load_yaml, ".yml": _load_yaml, ".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        remedy = "rename the file, choose a preset with --preset, or pass a text with --text"
        raise ConfigError("The file name of a plan must end in .yaml, .yml, .toml or .json", str(path), remedy)
    yaml_file = readers[path.suffix] is _load_yaml
    content = _content(path, _LARGEST_YAML if yaml_file else _LARGEST_FILE)
    try:
        values = readers[path.suffix](content.decode())
    except (yaml.YAMLError, tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        language = "YAML" if yaml_file else path.suffix[1:].upper()
        raise ConfigError(f"{path} is not valid {language}: {explain(error, content)}", "", "correct it") from error
    if values is None:
        remedy = "write at least one study, or choose a preset with --preset"
        raise ConfigError(f"The plan {path} is empty", "", remedy)
    return parse_plan(values, str(path))


def _content(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"No such file: {path}", "", "check the path") from error
    except (OSError, ValueError) as error:  # a ValueError for a path with a NUL character
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"Cannot read the plan {str(path)!r}: {reason}", "", "check the path") from error
    if len(content) > limit:
        remedy = "a plan has a few hundred bytes, so check that this is the right file"
        raise ConfigError(f"A plan may have at most {limit:,} bytes, but {path} is larger", "", remedy)
    return content


def _load_yaml(text: str) -> Any:
    """Read YAML whose aliases expand to a bounded size."""
    depth = 0
    for character in text:  # PyYAML needs seconds for deeply nested brackets
        depth += (character in "[{") - (character in "]}")
        if depth > _DEEPEST_BRACKETS:
            raise ValueError("it is nested too deeply")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > _MOST_NODES:
            raise ValueError(f"its aliases expand to more than {_MOST_NODES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of nodes below a node after aliases are expanded; `sizes` holds those known so far."""
    known = sizes.get(id(node))
    if known is not None:
        if known == 0:
            raise ValueError("an alias contains itself")
        return known
    sizes[id(node)] = 0  # being counted
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    sizes[id(node)] = 1 + sum(_expanded(child, sizes) for child in children)
    return sizes[id(node)]


def fits_memory(cell: Cell) -> bool:
    """Return False for a run that certainly needs more memory than this process may use."""
    available = memory_limit()
    return available is None or needed_bytes(cell) <= available


def check_memory(cell: Cell) -> None:
    """Raise ConfigError for a run that certainly needs more memory than this process may use."""
    available = memory_limit()
    if available is not None and not fits_memory(cell):
        plan, needed = cell.plan, needed_bytes(cell)
        what = f"batch_size {_shown(plan.train.batch_size)}, seq_len {_shown(plan.train.seq_len)}, {cell.depth} blocks"
        received = f"{what} (at least {needed / 2**30:,.0f} GiB)" if needed < 2**100 else what
        invariant = f"A run must fit into the available memory of {available / 2**30:.3g} GiB"
        raise ConfigError(invariant, received, "choose a smaller model or fewer tokens per step")


def needed_bytes(cell: Cell) -> int:
    """Return a lower bound of a run's memory: weights, gradients, two moments, one activation per block, logits."""
    plan = cell.plan
    tokens = plan.train.batch_size * plan.train.seq_len
    if cell.model is not None:
        return 4 * tokens * plan.model.vocab_size
    return 16 * count_weights(plan.model) + 4 * tokens * (plan.model.vocab_size + cell.depth * plan.model.d_model)


def _check_plain(value: object, depth: int = 0) -> None:
    """Raise ValueError for values that JSON can't represent, huge integers and deep nesting."""
    if depth > _DEEPEST:
        raise ValueError("its values are nested too deeply")
    if isinstance(value, dict):
        if not all(isinstance(key, str) and len(key) <= _LONGEST_TEXT for key in value):
            raise ValueError(f"keys must be texts of at most {_LONGEST_TEXT} characters")
        for item in value.values():
            _check_plain(item, depth + 1)
    elif isinstance(value, list):
        if len(value) > _LONGEST_LIST:
            raise ValueError(f"lists may have at most {_LONGEST_LIST} items")
        for item in value:
            _check_plain(item, depth + 1)
    elif isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
        raise ValueError("an integer is too large")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("numbers must be finite")
    elif isinstance(value, str) and len(value) > _LONGEST_TEXT:
        raise ValueError(f"texts may have at most {_LONGEST_TEXT} characters")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"values must be numbers, texts, lists or null, not {type(value).__name__}")


def _shown(value: object) -> str:
    """Return a value as text of at most 80 characters."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # integers of more than 4,300 digits cannot be printed
        return f"a {type(value).__name__} of many digits"


def _known(names: list[str], choices: tuple[str, ...]) -> list[str]:
    for name in names:
        if name not in choices:
            raise ValueError(f"{name!r:.80} is not one of {', '.join(choices)}")
    return names
