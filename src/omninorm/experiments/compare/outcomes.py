"""Checks of stored outcomes, because a damaged or edited file must not end the comparison that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omninorm.experiments.compare.cells import Cell

# Larger numbers can only come from damage, and sums or squares of them would overflow.
_LARGEST = 1e60
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-_LARGEST, le=_LARGEST)]
NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0, le=_LARGEST)]
Step = Annotated[int, Field(ge=0, le=10**12)]
Losses = list[Finite | None]


class _Outcome(BaseModel):
    model_config = ConfigDict(strict=True)


class _Undo(_Outcome):
    best: NotNegative | None
    learned: NotNegative | None


class _Train(_Outcome):
    status: str = Field(max_length=40)
    bits_per_byte: NotNegative | None
    initial_bits: NotNegative | None
    score: NotNegative
    diverged_at: Step | None
    largest_grad_norm: NotNegative | None
    spike_score: NotNegative | None
    losses: Losses
    undo: _Undo | None


class _Ramp(_Outcome):
    largest_rate: NotNegative
    sign: str | None
    last_good_step: Step
    losses: Losses


class _Init(_Outcome):
    stream_rms: list[NotNegative | None] = Field(min_length=1)
    grad_norms: list[NotNegative | None] = Field(min_length=1)
    growth: Finite | None


class _Counts(_Outcome):
    per_element: Annotated[float, Field(gt=0, le=_LARGEST)]


class _Speed(_Outcome):
    operations: dict[str, _Counts]


class _Clock(_Outcome):
    seconds: NotNegative | None = None
    ratios: dict[str, NotNegative | None] = Field(default_factory=dict)


_KINDS: dict[str, type[_Outcome]] = {"train": _Train, "ramp": _Ramp, "init": _Init, "speed": _Speed}


def outcome_fault(cell: Cell, outcome: object) -> str | None:
    """Return what is wrong with the stored outcome of a cell, or None."""
    fault = _fault(_KINDS[cell.protocol], outcome)
    if fault is not None or not isinstance(outcome, Mapping):
        return fault
    if cell.protocol == "speed":
        needed = {"layernorm", cell.norm.normalization} & {"layernorm", "rmsnorm"}
        missing = sorted(needed - outcome["operations"].keys())
        return f"operations.{missing[0]}: missing" if missing else None
    if cell.protocol == "init" and cell.model is None:
        lengths = {name: len(outcome[name]) for name in ("stream_rms", "grad_norms")}
        wrong = [f"{name}: {length} blocks of {cell.depth}" for name, length in lengths.items() if length != cell.depth]
        return wrong[0] if wrong else None
    return None


def clock_fault(clock: object) -> str | None:
    """Return what is wrong with the stored times of a run, or None."""
    return _fault(_Clock, clock)


def _fault(kind: type[_Outcome], values: object) -> str | None:
    try:
        kind.model_validate(values)
    except ValidationError as error:
        first: Any = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg']}"[:200] if place else str(first["msg"])[:200]
    return None
