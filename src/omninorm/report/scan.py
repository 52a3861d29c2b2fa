"""The first pass over a record: read everything except the samples, and note their offsets.

A sample's line is long (ten kilobytes with 48 blocks), and there may be ten thousand of them. They are recognized by
their first bytes, and `Scan.sample` parses one when it is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from omninorm.errors import RunError
from omninorm.record.signals import STEP_SERIES
from omninorm.report.story import Bad, Ending, StoryAlarm, Watched
from omninorm.report.values import DamageError, count, mapping, number, numbers, parse, text, text_or_none, watched

FORMAT = 1
_SAMPLE = re.compile(rb'\s*\{\s*"kind"\s*:\s*"sample"\s*,\s*"step"\s*:\s*(\d{1,15})\s*[,}]')
_STOPS = ("finished", "diverged", "interrupted")


class Scan:
    """The contents of one record file.

    Args:
        path: the file.
        rank: the rank that wrote it; its alarms get this number.

    Raises:
        RunError: the file can't be read, or was written by a newer omninorm.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path, self.rank = path, rank
        self.watched: Watched | None = None
        self.seen: dict[str, Any] = {}
        self.series: dict[str, dict[int, float]] = {name: {} for name in STEP_SERIES}
        self.evals: dict[int, float] = {}
        self.evaluations: dict[str, dict[int, float]] = {}
        """Held-out losses that were passed to `Watch.log_eval`, by name."""
        self.samples: dict[int, int] = {}
        """Offsets in the file, by step."""
        self.alarms: list[StoryAlarm] = []
        self.bad: Bad | None = None
        self.speeds: list[float] = []
        self.replaced: list[tuple[int, int]] = []
        """Restarts of the run: the step after which it was restarted, and the last step recorded until then."""
        self.events = self.damaged = 0
        self._begun = True
        self._end: tuple[int, str] | None = None
        self._stop: tuple[int, str] | None = None
        try:
            # Lines are longer than the default buffer, with which reading is four times slower.
            with open(path, "rb", buffering=1 << 20) as file:
                self._read(file)
        except OSError as error:
            problem = f"Cannot read the record {path}: {error.strerror}"
            raise RunError(problem, "", "check the path and the permissions") from error

    @property
    def hopeful(self) -> bool:
        """Whether the file may be a record without events yet: it is empty, or its first line is incomplete."""
        return self._begun and not self.damaged

    @property
    def ending(self) -> Ending:
        """The end that the trainer recorded, or else the watch, with the error that the watch recorded."""
        reason = self._end[1] if self._end and self._end[1] != "done" else None
        if self._stop:
            return Ending(*self._stop, reason)
        if self._end:
            return Ending(self._end[0], "error" if reason else "done", reason)
        return Ending()

    def sample(self, file: BinaryIO, step: int) -> dict[str, Any]:
        """Parse the event "sample" of a step; raise DamageError if it is damaged."""
        file.seek(self.samples[step])
        return parse(file.readline())

    def _read(self, file: BinaryIO) -> None:
        offset = 0
        for line in file:
            self._begun = self._begun and line.lstrip()[:1] in (b"", b"{")
            if line.endswith(b"\n"):  # otherwise it is incomplete, or being written right now
                self._line(line, offset)
            offset += len(line)

    def _line(self, line: bytes, offset: int) -> None:
        found = _SAMPLE.match(line)
        # Merged or truncated lines do not match; they are parsed to be sure.
        if found and line.endswith(b"}\n") and line.count(b'"kind"') == 1:
            self.samples[int(found[1])] = offset
            self.events += 1
        elif not line.isspace():
            try:
                self._event(parse(line), offset)
                self.events += 1
            except DamageError:
                self.damaged += 1

    def _event(self, event: dict[str, Any], offset: int) -> None:
        kind, step = event["kind"], event["step"]
        if kind == "sample":
            self.samples[step] = offset
        elif kind in _STOPS:
            self._stop = (step, kind)
        elif kind == "end":
            self._end = (step, text(event.get("reason"), "no reason"))
        elif kind == "resume":
            last = self._void(step)
            # A resume from a checkpoint discards a few steps; a resume from step 0 is another run.
            self.replaced += [(0, last)] if last and step == 0 else []
        else:
            handler = getattr(self, f"_on_{kind}", None) if kind in _HANDLED else None
            if handler:
                handler(event)

    def _on_step(self, event: dict[str, Any]) -> None:
        for name in STEP_SERIES:
            value = number(event.get(name))
            if value is not None:
                self.series[name][event["step"]] = value
        speed = number(mapping(event.get("clock")).get("tokens_per_second"))
        if speed is not None:
            self.speeds.append(speed)

    def _on_steps(self, event: dict[str, Any]) -> None:
        first = count(event.get("first"))
        for name in STEP_SERIES:
            pairs = dict(zip(range(first, event["step"] + 1), numbers(event.get(name) or []), strict=False))
            self.series[name].update(_known(pairs))

    def _on_eval(self, event: dict[str, Any]) -> None:
        value = number(event.get("bits_per_byte"))
        if value is not None:
            self.evals[event["step"]] = value

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        value = number(event.get("loss"))
        if value is not None:
            self.evaluations.setdefault(text(event.get("name"), "eval"), {})[event["step"]] = value

    def _on_watch(self, event: dict[str, Any]) -> None:
        written = event.get("format")
        if isinstance(written, int) and written > FORMAT:
            problem = (
                f"{self.path} has record format {str(written)[:20]}, but this version of omninorm reads format {FORMAT}"
            )
            raise RunError(problem, "", "upgrade omninorm to the version that wrote it")
        # A watch that starts at step N without a resume replaces everything after N.
        last = self._void(event["step"])
        self.replaced += [(event["step"], last)] if last else []
        self.watched = watched(event)

    def _on_seen(self, event: dict[str, Any]) -> None:
        self.seen = event

    def _on_alarms(self, event: dict[str, Any]) -> None:
        alarms = event.get("alarms")
        if not isinstance(alarms, list):
            raise DamageError("alarms is not a list")
        found = [StoryAlarm.from_record(each, event["step"]) for each in alarms if isinstance(each, dict)]
        self.alarms += [replace(alarm, ranks=(self.rank,)) for alarm in found]

    def _on_nonfinite(self, event: dict[str, Any]) -> None:
        layer, value = text_or_none(event.get("layer")), text(event.get("value"), "nan")
        phase, after = text(event.get("phase"), "unknown"), text_or_none(event.get("after"))
        self.bad = self.bad or Bad(event["step"], phase, layer, value, self.rank, after)

    def _void(self, step: int) -> int:
        """Discard everything after a step, and any end; return the last step discarded, 0 if there was none."""
        curves: list[Mapping[int, float]] = [*self.series.values(), self.samples]
        last = max(max(curve, default=0) for curve in curves)
        self.series = {name: _until(step, values) for name, values in self.series.items()}
        self.samples, self.evals = _until(step, self.samples), _until(step, self.evals)
        self.evaluations = {name: _until(step, values) for name, values in self.evaluations.items()}
        self.alarms = [alarm for alarm in self.alarms if alarm.step <= step]
        self.bad = self.bad if self.bad and self.bad.step <= step else None
        self._end = self._stop = None
        return last if last > step else 0


_HANDLED = {name.removeprefix("_on_") for name in vars(Scan) if name.startswith("_on_")}


def _known(values: dict[int, float | None]) -> dict[int, float]:
    """Drop the entries that are None; usually there are none, and the dictionary itself is returned."""
    if None in values.values():
        return {step: value for step, value in values.items() if value is not None}
    return values  # type: ignore[return-value]


def _until(step: int, values: dict[int, Any]) -> dict[int, Any]:
    return {name: value for name, value in values.items() if name <= step}
