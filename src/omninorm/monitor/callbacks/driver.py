"""Base class of the callbacks: a watch driven by a trainer's events, and the loss of a step of several batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from omninorm.config import read_count
from omninorm.errors import OmninormError
from omninorm.monitor import watch
from omninorm.monitor.arguments import read_facts
from omninorm.monitor.rules import Rule
from omninorm.monitor.session import Watch
from omninorm.monitor.sinks import Sink
from omninorm.monitor.writer import rank
from omninorm.record.alarm import Alarm
from omninorm.record.jsonl import REPORT_FILE
from omninorm.report import write_report

Self = TypeVar("Self", bound="Driver")


class Total:
    """A sum of numbers that stay on their device, and their count."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor | float) -> None:
        term = (
            value.detach().float().mean()
            if isinstance(value, Tensor)
            else torch.tensor(float(value), dtype=torch.float32)
        )
        self._sum = term if self._sum is None else self._sum + term
        self._count += 1

    def take(self, mean: bool = False) -> Tensor | None:
        """Return the sum or the mean, None if there were no numbers, and reset."""
        total, count = self._sum, self._count
        self._sum, self._count = None, 0
        return total / count if mean and total is not None else total


class Driver:
    """A watch that a trainer's events open, step and close.

    As a context manager around the training it also closes the record when an exception leaves the trainer, of which
    the trainer does not notify its callbacks.

    Args:
        every: steps between samples of all signals.
        folder: where record.jsonl is appended; None means the trainer's output folder.
        sinks: further loggers, see `omninorm.monitor.sinks`.
        rules: the alarm rules; None means `default_rules()`.
        report: whether report.html is written into the folder at the end.
        replicas: see `omninorm.watch`.
        config: facts about the run for the report page, next to the trainer's own settings.
        name: the title of the report page; None means the name of the trainer's run, or else of the folder.

    Attributes:
        watch: the Watch of the latest training; None before the first.

    Raises:
        ConfigError: `every` is not a whole number ≥ 1, `config` not a dictionary with text as keys, or `name` not text.
    """

    def __init__(
        self,
        every: int = 10,
        folder: str | Path | None = None,
        *,
        sinks: Sequence[Sink] = (),
        rules: Sequence[Rule] | None = None,
        report: bool = True,
        replicas: bool = True,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        every = read_count("every", every)
        read_facts(config, name)
        self._replicas, self._config, self._name = replicas, config or {}, name
        self._every, self._given_folder, self._sinks, self._rules = every, folder, sinks, rules
        self._with_report = report
        self.watch: Watch | None = None
        self._running = False
        self._report: Path | None = None
        """Path of the report; None if it is disabled or another process writes it."""

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms so far, oldest first."""
        return [] if self.watch is None else self.watch.alarms

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end("done" if error is None else f"{type(error).__name__}: {error}")

    def _begin(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        folder: str | Path,
        step: int,
        scaler: Any,
        settings: Mapping[str, Any],
        name: str | None,
    ) -> None:
        """Open a watch, closing one that an earlier training left open. `settings` and `name` are the trainer's."""
        self._end("the previous training did not end")
        folder = Path(folder if self._given_folder is None else self._given_folder)
        first = rank() == 0
        self._report = folder / REPORT_FILE if self._with_report and first else None
        sinks = self._sinks if first else ()
        self.watch = watch(
            model,
            optimizers or None,
            self._every,
            folder,
            step=step,
            scaler=scaler,
            sinks=sinks,
            rules=self._rules,
            replicas=self._replicas,
            config={**settings, **self._config},
            name=self._name or name,
        ).open()
        self._running = True

    def _end_step(self, loss: Tensor | None) -> None:
        if self.watch is not None and self._running:
            self.watch.step(loss)

    def _end(self, reason: str = "done") -> None:
        """Close the watch and write the report. A second call does nothing."""
        if self.watch is None or not self._running:
            return
        self._running = False
        self.watch.close(reason)
        if self._report is None:
            return
        try:
            write_report(self._report.parent, self._report)
        except OmninormError as error:
            # The training has succeeded, so an error here must not hide its result.
            warnings.warn(f"omninorm.watch could not write the report: {error}", stacklevel=2)
