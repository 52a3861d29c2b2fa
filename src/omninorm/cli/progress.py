"""Progress of a training run: a live line on a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from omninorm.cli.console import console
from omninorm.cli.harmless import harmless
from omninorm.experiments.events import AlarmEvent, CheckpointEvent, EvalEvent, Event, StepEvent, TrainResult
from omninorm.experiments.runs import Run

_SECONDS_BETWEEN_LINES = 10.0


def show_progress(run: Run) -> TrainResult:
    """Train the run and print its events."""
    screen = console()
    if not screen.is_terminal:
        return run.train(_Lines(screen, run.plan.train.steps))
    # The line fits a terminal of 80 columns.
    columns = (
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=screen, refresh_per_second=8) as progress:
        task = progress.add_task("evaluating the untrained model", total=run.plan.train.steps)
        return run.train(_Bar(progress, task))


class _Bar:
    """Prints events to a terminal: the bar shows the newest step, and evaluations scroll above it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._held_out = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self._progress.update(self._task, completed=event.step, description=_brief(event) + self._held_out)
        elif isinstance(event, EvalEvent):
            self._held_out = f"  eval {event.bits_per_byte:.2f} bits/byte"
            self._progress.console.print(f"step {event.step:>6}  {event.bits_per_byte:.3f} bits/byte on held-out text")
        elif isinstance(event, AlarmEvent):
            self._progress.console.print(alarm_text(event))


class _Lines:
    """Prints events as lines, for output in which the cursor cannot move, such as a log file."""

    def __init__(self, screen: Console, steps: int) -> None:
        self._screen = screen
        self._steps = steps
        self._started = self._last = time.monotonic()
        self._first: int | None = None
        self._newest = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self._newest = f"{_numbers(event)}  {self._time_left(event.step)}"
            if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
                self._print(f"step {event.step}/{self._steps}  {self._newest}")
        elif isinstance(event, EvalEvent):
            held_out = f"held-out {event.bits_per_byte:.3f} bits/byte"
            self._print(f"step {event.step}/{self._steps}  {held_out}  {self._newest}".rstrip())
        elif isinstance(event, CheckpointEvent):
            self._print(f"step {event.step}/{self._steps}  checkpoint {event.path}")
        elif isinstance(event, AlarmEvent):
            self._print(alarm_text(event))

    def _time_left(self, step: int) -> str:
        if self._first is None:
            self._first = step - 1
        per_step = (time.monotonic() - self._started) / (step - self._first)
        seconds = round(per_step * (self._steps - step))
        return f"{seconds // 60}:{seconds % 60:02d} left"

    def _print(self, line: str) -> None:
        self._last = time.monotonic()
        # Flush, because a pipe or a file would otherwise receive the lines only when the buffer is full.
        self._screen.print(line)
        self._screen.file.flush()


def alarm_text(event: AlarmEvent) -> str:
    """Return an alarm as a paragraph: the layer, the evidence and the remedy."""
    alarm = event.alarm
    where = f" {alarm.layer}:" if alarm.layer else ""
    text = f"step {alarm.step:>6}  {alarm.severity.upper()} {alarm.rule}:{where} {alarm.linked_evidence}\n"
    return harmless(f"{text}             {alarm.remedy}")


def _brief(event: StepEvent) -> str:
    """Return the numbers of a step, short enough for an evaluation's next to them on a terminal of 80 columns."""
    return f"loss {event.loss:.2f} nats/token  {event.tokens_per_second:,.0f} tok/s"


def _numbers(event: StepEvent) -> str:
    return f"loss {event.loss:.3f} nats/token  lr {event.lr:.1e}  {event.tokens_per_second:,.0f} tok/s"
