"""results.json and timings.json, read back. They may come from anywhere: what they must be is written down here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omninorm.errors import MissingExtraError, RunError

try:
    from pydantic import BaseModel, Field, ValidationError
except ImportError as missing:
    raise MissingExtraError(
        "pages of comparisons need pydantic",
        "an installation without it",
        'install it with pip install "omninorm[compare]"',
    ) from missing

RESULTS_FILE, TIMINGS_FILE = "results.json", "timings.json"
FORMAT = 2
Number = float | None


class Condition(BaseModel):
    """A condition of a claim: "yes", "no" or "unclear", its mean and interval against the threshold."""

    label: str
    outcome: str
    more: int
    mean: Number
    low: Number
    high: Number
    threshold: float
    above: bool
    seeds: int
    unit: str
    scale: str


class Card(BaseModel):
    """A claim's verdict."""

    id: str
    claim: str
    measured: str
    conditions: list[Condition]
    verdict: str
    found: str
    source: str
    command: str


class Configuration(BaseModel):
    """A configuration at a depth and at its best rate. curve: (step, training loss in bits per byte)."""

    label: str
    depth: int
    lr: Number
    values: dict[str, Number]
    lost: list[str]
    missing: int
    by_rate: list[tuple[float, Number]] = Field(default_factory=list)
    sensitivity: Number = None
    spike_score: Number = None
    curve: list[tuple[int, Number]] = Field(default_factory=list)
    stream_rms: list[Number] = Field(default_factory=list)
    grad_norms: list[Number] = Field(default_factory=list)


class Difference(BaseModel):
    """A configuration against the study's first one."""

    depth: int
    label: str
    against: str
    seeds: int
    mean: Number
    low: Number
    high: Number
    verdict: str = ""


class StudyResults(BaseModel):
    """A study's configurations and their differences."""

    name: str
    protocol: str
    unit: str
    lower_is_better: bool
    margin: float
    configurations: list[Configuration]
    comparisons: list[Difference]


class Text(BaseModel):
    """What was trained on."""

    name: str
    sha256: str
    bytes: int
    unigram_bits_per_byte: float


class _Results(BaseModel):
    format: int
    plan: dict[str, Any]
    text: Text
    studies: list[StudyResults]
    claims: list[Card]
    failures: dict[str, str]


class _Clock(BaseModel):
    """Of a run only how long it took is told."""

    seconds: Number = None


class _Timings(BaseModel):
    format: int
    claims: list[Card] = Field(default_factory=list)
    cells: dict[str, _Clock] = Field(default_factory=dict)


class Comparison(BaseModel):
    """Everything that the page tells.

    Args:
        title: the plan's.
        plan: what was compared, as the user wrote it.
        text: what was trained on.
        studies: the results of each.
        claims: cards, those about speed included.
        failures: why runs have no outcome, by their ids.
        seconds: that all runs took together; None where it is not known.
    """

    title: str
    plan: dict[str, Any]
    text: Text
    studies: list[StudyResults]
    claims: list[Card]
    failures: dict[str, str]
    seconds: Number


def is_comparison(path: Path) -> bool:
    """Whether the folder is one that `omninorm compare` has finished."""
    return (path / RESULTS_FILE).exists() and (path / TIMINGS_FILE).exists()


def read_comparison(path: Path) -> Comparison:
    """Reads a comparison's folder.

    Raises:
        RunError: a file is missing, damaged, or of another format.
    """
    results = _read(path / RESULTS_FILE, _Results)
    timings = _read(path / TIMINGS_FILE, _Timings)
    named = results.plan.get("claims")
    order = {str(name): at for at, name in enumerate(named if isinstance(named, list) else [])}
    claims = sorted([*results.claims, *timings.claims], key=lambda card: order.get(card.id, len(order)))
    seconds = [cell.seconds for cell in timings.cells.values() if cell.seconds is not None]
    return Comparison(
        title=str(results.plan.get("title", "Comparison")),
        plan=results.plan,
        text=results.text,
        studies=results.studies,
        claims=claims,
        failures=results.failures,
        seconds=sum(seconds) if seconds else None,
    )


_File = TypeVar("_File", _Results, _Timings)


def _read(path: Path, kind: type[_File]) -> _File:
    remedy = "name a folder that `omninorm compare` wrote, or let it write the file anew with --resume"
    try:
        content = json.loads(path.read_bytes())
        found = content.get("format") if isinstance(content, Mapping) else None
        if found != FORMAT:
            raise RunError(f"results have format {FORMAT}", f"{found!r} in {path}", remedy)
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RunError("results must be complete", f"{place} in {path}: {first['msg']}", remedy) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError("results must be readable JSON", f"{path} ({error})", remedy) from error
