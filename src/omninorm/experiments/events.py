"""The events of a training run and its result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omninorm.monitor import Alarm


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step.

    Args:
        step: the number of the step, counted from 1.
        loss: mean cross entropy in nats per token before the step, over all micro-batches.
        grad_norm: total gradient norm before clipping; infinite or NaN if float16's loss scaler skipped the step.
        seconds: duration of the step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class EvalEvent:
    """An evaluation after `step` steps; step 0 is the untrained model."""

    step: int
    bits_per_byte: float
    seconds: float


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint was written. The event is not recorded, because the folder shows which checkpoints there are."""

    step: int
    path: Path


@dataclass(frozen=True)
class AlarmEvent:
    """The monitor raised an alarm; the monitor itself records it."""

    step: int
    alarm: Alarm


@dataclass(frozen=True)
class StopEvent:
    """The end of training in this process: "finished", "interrupted" (by `signal`) or "diverged".

    A run has diverged if the loss or the gradient norm of step `step`, the evaluation, or the weights to save are not
    finite.
    """

    step: int
    status: str
    loss: float | None = None
    grad_norm: float | None = None
    signal: int | None = None


Event = StepEvent | EvalEvent | CheckpointEvent | AlarmEvent | StopEvent
Callback = Callable[[Event], None]


@dataclass(frozen=True)
class TrainResult:
    """The result of a run; after a resume it includes the earlier parts, read from the record.

    Args:
        status: "finished", "diverged" or "interrupted".
        steps: number of completed optimizer steps.
        step_events: the recorded steps, in order.
        eval_events: the evaluations, in order.
        signal: the number of the signal that interrupted the run, or None.
        folder: the run's folder, or None.
        alarms: the monitor's alarms since the last resume.
    """

    status: str
    steps: int
    step_events: tuple[StepEvent, ...]
    eval_events: tuple[EvalEvent, ...]
    signal: int | None = None
    folder: Path | None = None
    alarms: tuple[Alarm, ...] = ()

    @property
    def losses(self) -> list[float]:
        """Losses in nats per token, one for each recorded step."""
        return [event.loss for event in self.step_events]

    @property
    def grad_norms(self) -> list[float]:
        """Total gradient norms before clipping, one for each recorded step."""
        return [event.grad_norm for event in self.step_events]

    @property
    def largest_grad_norm(self) -> float:
        """Largest gradient norm of the recorded steps; NaN counts as larger than anything."""
        norms = self.grad_norms
        return math.nan if any(math.isnan(norm) for norm in norms) or not norms else max(norms)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the last evaluation; NaN if there was none."""
        return self.eval_events[-1].bits_per_byte if self.eval_events else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Median throughput of the recorded steps, without evaluations and checkpoints."""
        rates = [event.tokens_per_second for event in self.step_events]
        return statistics.median(rates) if rates else math.nan


def to_record(event: StepEvent | EvalEvent | StopEvent) -> dict[str, Any]:
    """Return the event as a line of record.jsonl. Values that depend on the machine are under "clock"."""
    if isinstance(event, StepEvent):
        clock = {"seconds": event.seconds, "tokens_per_second": event.tokens_per_second}
        values = {"loss": event.loss, "grad_norm": event.grad_norm, "lr": event.lr}
        return {"kind": "step", "step": event.step, **values, "clock": clock}
    if isinstance(event, EvalEvent):
        clock = {"seconds": event.seconds}
        return {"kind": "eval", "step": event.step, "bits_per_byte": event.bits_per_byte, "clock": clock}
    optional = {"loss": event.loss, "grad_norm": event.grad_norm, "signal": event.signal}
    given = {name: value for name, value in optional.items() if value is not None}
    return {"kind": event.status, "step": event.step, **given}


def from_record(line: Mapping[str, Any]) -> StepEvent | EvalEvent | StopEvent:
    """Return the event that `to_record` wrote as `line`.

    Raises:
        KeyError: a value is missing.
    """
    step = line["step"]
    if line["kind"] == "step":
        return StepEvent(step, line["loss"], line["grad_norm"], line["lr"], **line["clock"])
    if line["kind"] == "eval":
        return EvalEvent(step, line["bits_per_byte"], **line["clock"])
    return StopEvent(step, line["kind"], line.get("loss"), line.get("grad_norm"), line.get("signal"))
