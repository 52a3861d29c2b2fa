"""Reader of results.json and timings.json. The files may come from elsewhere, so every value is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from omninorm.errors import MissingExtraError, RunError
from omninorm.report.text import plain

try:
    from pydantic import BaseModel, Field, ValidationError
except ImportError as missing:
    raise MissingExtraError(
        "A comparison's page needs pydantic", "", 'install it with pip install "omninorm[compare]"'
    ) from missing

RESULTS_FILE, TIMINGS_FILE = "results.json", "timings.json"
FORMAT = 2
# Larger numbers come from damage, and sums or squares of them would overflow.
_LARGEST = 1e60
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-_LARGEST, le=_LARGEST)]
Number = Finite | None
Count = Annotated[int, Field(ge=0, le=10**12)]


class Condition(BaseModel):
    """A condition of a claim: "yes", "no" or "unclear", its mean and interval against the threshold."""

    label: str
    outcome: str
    more: Count
    mean: Number
    low: Number
    high: Number
    threshold: Finite
    above: bool
    seeds: Count
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
    """A configuration at a depth and its best learning rate.

    Args:
        lost: the seeds whose runs diverged.
        outcomes: "learned", "stagnated" or "diverged" by seed; empty in older files and for other protocols.
        curve: (step, training loss in bits per byte).
    """

    label: str
    depth: Count
    lr: Number
    values: dict[str, Number]
    lost: list[str]
    missing: Count
    outcomes: dict[str, str] = Field(default_factory=dict)
    by_rate: list[tuple[Finite, Number]] = Field(default_factory=list)
    sensitivity: Number = None
    spike_score: Number = None
    curve: list[tuple[Count, Number]] = Field(default_factory=list)
    stream_rms: list[Number] = Field(default_factory=list)
    grad_norms: list[Number] = Field(default_factory=list)


class Difference(BaseModel):
    """The difference between a configuration and the study's first one."""

    depth: Count
    label: str
    against: str
    seeds: Count
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
    margin: Finite
    configurations: list[Configuration]
    comparisons: list[Difference]


class Text(BaseModel):
    """The text that the models were trained on."""

    name: str
    sha256: str
    bytes: Count
    unigram_bits_per_byte: Finite


class _Results(BaseModel):
    format: int
    plan: dict[str, Any]
    text: Text
    studies: list[StudyResults]
    claims: list[Card]
    failures: dict[str, str]


class _Clock(BaseModel):
    """A run's duration in seconds."""

    seconds: Number = None


class _Timings(BaseModel):
    format: int
    claims: list[Card] = Field(default_factory=list)
    cells: dict[str, _Clock] = Field(default_factory=dict)


class Comparison(BaseModel):
    """The content of a comparison's page.

    Args:
        title: the plan's title.
        plan: the plan, as the user wrote it.
        text: the text that the models were trained on.
        studies: the results of each study.
        claims: the claims' cards, including those about speed.
        failures: the reasons of failed runs, by their ids.
        seconds: the total duration of all runs; None if it is not known.
    """

    title: str
    plan: dict[str, Any]
    text: Text
    studies: list[StudyResults]
    claims: list[Card]
    failures: dict[str, str]
    seconds: Number


def is_comparison(path: Path) -> bool:
    """Return whether the folder holds the results of `omninorm compare`."""
    return (path / RESULTS_FILE).exists() and (path / TIMINGS_FILE).exists()


def read_comparison(path: Path) -> Comparison:
    """Read a comparison's folder.

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
    remedy = "use a folder written by omninorm compare, or write the file again with omninorm compare --resume FOLDER"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"Cannot read {path}: {error.strerror or error}", "", remedy) from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid JSON: {plain(error, 200)}", "", remedy) from error
    found = content.get("format") if isinstance(content, Mapping) else None
    if found != FORMAT:
        received = plain(found, 80) if isinstance(found, int | float | str | None) else type(found).__name__
        raise RunError(f"The results in {path} must have format {FORMAT}", received, remedy)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = plain(".".join(str(part) for part in first["loc"]), 200)
        raise RunError(f"{path} is damaged at {place}: {plain(first['msg'], 200)}", "", remedy) from None
