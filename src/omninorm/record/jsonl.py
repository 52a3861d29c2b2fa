"""record.jsonl: the events of a run, one JSON object per line. The file is append-only."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from omninorm.errors import RunError
from omninorm.record.files import remove_abandoned_files, sync_folder, write_all, writing

RECORD_FILE = "record.jsonl"
REPORT_FILE = "report.html"  # the page that is written next to a record
# Events that end a process. They are no longer valid when the run is resumed.
_STOPS = ("interrupted", "diverged", "finished")
# Events of a training run, whose values are all numbers. The events of `omninorm.watch` also have names and lists.
_KIND = re.compile(rb'\{"kind": "([a-z]+)"')
_NUMBERS = ("step", "eval", "resume", *_STOPS)


class Record:
    """Appends events to a record. A line that cannot be written completely, as on a full disk, is removed again.

    Opening a record removes an incomplete last line and a temporary file of the report, which a kill or a power failure
    may have left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            new = not os.path.lexists(path)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.ftruncate(self._descriptor, _whole(path.read_bytes()))
                if new:
                    sync_folder(path.parent)
                remove_abandoned_files(path.parent, REPORT_FILE)
            except BaseException:
                os.close(self._descriptor)
                raise

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event and flush it to the operating system. NaN and infinities become strings.

        Raises:
            RunError: the disk is full, or the file can no longer be written.
        """
        line = json.dumps(json_values(event), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with writing(self.path):
            end = os.lseek(self._descriptor, 0, os.SEEK_END)
            try:
                write_all(self._descriptor, line)
            except OSError:
                os.ftruncate(self._descriptor, end)
                raise

    def sync(self) -> None:
        """Sync all events to disk, so that no checkpoint is ever newer than its record."""
        with writing(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def read_history(path: Path, kinds: Container[str] | None = None) -> list[dict[str, Any]]:
    """Return the events in the file, in order. An incomplete last line is ignored.

    Args:
        path: the record.
        kinds: the kinds to return; lines of other kinds are skipped without parsing. None means all.

    Raises:
        RunError: the file cannot be read, or a complete line is not an event.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        problem = f"Cannot read the record {path}: {error.strerror}"
        raise RunError(problem, "", "check the path and the permissions") from error
    events = []
    for number, line in enumerate(content[: _whole(content)].splitlines(), start=1):
        named = _KIND.match(line)
        if kinds is not None and named is not None and named[1].decode() not in kinds:
            continue
        try:
            event = _decode(json.loads(line))
            _check_event(event)
        except (ValueError, RecursionError) as error:
            problem = f"Line {number} of {path} is not an event ({error})"
            raise RunError(problem, "", "delete that line") from error
        events.append(event)
    return events


def read_record(path: Path) -> list[dict[str, Any]]:
    """Return the run's events as if it had never been interrupted, even if it was killed and resumed.

    An event {"kind": "resume", "step": N} discards all events after step N and all stops; a later event of the same
    kind and step replaces the earlier one. Durations are separate, under "clock". Events of `omninorm.watch` are left
    out; `omninorm.report.read_run` reads them.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "record.jsonl")
        ...     record = Record(path)
        ...     record.append({"kind": "step", "step": 1, "loss": 5.5})
        ...     record.append({"kind": "step", "step": 2, "loss": 5.0})
        ...     record.append({"kind": "resume", "step": 1})
        ...     record.close()
        ...     read_record(path)
        [{'kind': 'step', 'step': 1, 'loss': 5.5}]
    """
    story: dict[tuple[str, int], dict[str, Any]] = {}
    for event in read_history(path, _NUMBERS):
        if event["kind"] == "resume":
            story = {key: old for key, old in story.items() if key[1] <= event["step"] and key[0] not in _STOPS}
        elif event["kind"] in _NUMBERS:
            story[event["kind"], event["step"]] = event
    return list(story.values())


def _check_event(event: Any) -> None:
    """Raise ValueError unless the event has a kind and a step, and its values are numbers where they must be."""
    if not isinstance(event, dict) or "kind" not in event or "step" not in event:
        raise ValueError("it has no kind and step")
    if not isinstance(event["kind"], str):
        raise ValueError("its kind is not a string")
    if not isinstance(event["step"], int) or event["step"] < 0:
        raise ValueError("its step is not a whole number >= 0")
    clock = event.get("clock", {})
    if not isinstance(clock, dict):
        raise ValueError("its clock is not an object")
    numbers = {**event, **clock} if event["kind"] in _NUMBERS else {}
    for name, value in numbers.items():
        if name not in ("kind", "clock") and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name[:80]} is not a number")


def final_status(path: Path) -> str | None:
    """Return "finished" or "diverged" if the run of this record has ended with this status, otherwise None."""
    kinds = {event["kind"] for event in read_record(path)}
    return next((status for status in ("finished", "diverged") if status in kinds), None)


def _whole(content: bytes) -> int:
    """Return the length of the content up to and including its last newline."""
    return content.rfind(b"\n") + 1


def json_values(value: Any) -> Any:
    """Return a copy for JSON, in which "nan", "inf" and "-inf" replace the numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) if item.__class__ is not float else item for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
