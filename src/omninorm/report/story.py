"""RunStory: the contents of a run's record, validated and small enough to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omninorm.record.alarm import Alarm
from omninorm.record.signals import Limit

Values = list[float | None]


class Series(NamedTuple):
    """A number over steps: `steps` ascending, with one value each, which may be NaN or infinite."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Norm:
    """A norm of the model, as recorded."""

    name: str
    kind: str = ""
    eps: float | None = None
    block: int | None = None
    frozen: bool = False
    ours: bool = False


@dataclass(frozen=True)
class Watched:
    """What omninorm.watch recorded about the model and itself when it was opened."""

    step: int = 0
    every: int | None = None
    world_size: int = 1
    started: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    parameters: int | None = None
    blocks: Sequence[str] = ()
    norms: Sequence[Norm] = ()
    groups: Sequence[str] = ()
    optimizer: str | None = None
    adam_eps: float | None = None
    name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    limits: Sequence[Limit] = ()

    def names(self, axis: str) -> list[str]:
        """Return the names along an axis of the signals; ["run"] for the axis "run"."""
        if axis == "norm":
            return [norm.name for norm in self.norms]
        return list({"run": ["run"], "block": self.blocks, "group": self.groups}[axis])


class Column(NamedTuple):
    """A sample: for each signal a list along its axis, with None for missing values.

    `bounds` has the lowest and highest ordinary value of curves whose limits move."""

    step: int
    signals: dict[str, Values]
    bounds: Mapping[str, Values] = {}


@dataclass(frozen=True)
class StoryAlarm(Alarm):
    """An alarm as it was recorded, on one or more ranks of a distributed run."""

    ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Bad:
    """The first NaN or infinity: where in the step ("forward", "loss", "backward", "optimizer"), in which module, and
    which module's output, the last one checked before, was finite."""

    step: int
    phase: str
    layer: str | None
    value: str
    rank: int = 0
    after: str | None = None


@dataclass(frozen=True)
class Ending:
    """The end of the record.

    Args:
        step: the last step; None if no end was recorded.
        status: "finished", "diverged", "interrupted", "done", "error", or "open": still running, or killed.
        reason: the error message, if there was an error.
    """

    step: int | None = None
    status: str = "open"
    reason: str | None = None


@dataclass(frozen=True)
class RunStory:
    """A run, as recorded.

    Args:
        source: the record's path as given.
        watched: None if the record has no watch events; then there are no samples and no alarms.
        placement: as measured; None if unknown.
        placement_reason: why the placement is unknown; empty if it is known or no reason was recorded.
        padding: how padding was recognized, "attention mask" or "zero rows"; None without any.
        dtype: of the residual stream; None if unknown.
        not_seen: reasons for missing signals, by signal.
        series: all steps of "loss", "grad_norm" and "lr".
        evals: bits per byte by step.
        evaluations: the losses passed to `Watch.log_eval`, by name.
        columns: the samples that were read, by step.
        samples: the number of samples in the record.
        worst: each group's worst tensor in the latest sample, by signal.
        alarms: of all ranks, by step.
        bad: the first non-finite value on each rank that has one.
        tokens_per_second: the median, if recorded.
        config: config.json of `omninorm train`; empty if there is none.
        notes: remarks about the record itself, such as damaged lines.
    """

    source: Path
    watched: Watched | None = None
    placement: str | None = None
    placement_reason: str = ""
    padding: str | None = None
    dtype: str | None = None
    not_seen: Mapping[str, str] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)
    evals: Series = field(default_factory=lambda: Series([], []))
    evaluations: Mapping[str, Series] = field(default_factory=dict)
    columns: Sequence[Column] = ()
    samples: int = 0
    worst: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    alarms: Sequence[StoryAlarm] = ()
    bad: Sequence[Bad] = ()
    ending: Ending = field(default_factory=Ending)
    tokens_per_second: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def last_step(self) -> int:
        """The last step for which anything was recorded; 0 if nothing was."""
        known = [
            series.steps[-1]
            for series in (*self.series.values(), self.evals, *self.evaluations.values())
            if series.steps
        ]
        known += [self.ending.step or 0, self.columns[-1].step if self.columns else 0]
        return max([*known, *(alarm.step for alarm in self.alarms), *(bad.step for bad in self.bad)])

    @property
    def first_step(self) -> int:
        """The first step of any curve or sample; 0 if there is none."""
        known = [series.steps[0] for series in self.series.values() if series.steps]
        known += [column.step for column in self.columns[:1]]
        return min(known, default=0)

    def count(self, severity: str) -> int:
        """Return the number of alarms of a severity, "warn" or "fail"."""
        return sum(alarm.severity == severity for alarm in self.alarms)
