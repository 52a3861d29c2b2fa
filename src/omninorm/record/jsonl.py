"""record.jsonl: what happened in a run, one JSON event per line, only ever appended to."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from omninorm.errors import RunError
from omninorm.record.files import sync_folder, write_all, writing

RECORD_FILE = "record.jsonl"
# Ways for a process to stop. What they say is no longer true once the run goes on.
_STOPS = ("interrupted", "diverged", "finished")
# What a training run says of itself, in numbers alone. The events of `omninorm.watch` hold names and lists, too.
_KIND = re.compile(rb'\{"kind": "([a-z]+)"')
_NUMBERS = ("step", "eval", "resume", *_STOPS)


class Record:
    """Appends events to a record. Every line is written whole, or removed again when the disk is full.

    Opening it cuts off a torn last line, which a kill or a power failure may have left.
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
            except BaseException:
                os.close(self._descriptor)
                raise

    def append(self, event: Mapping[str, Any]) -> None:
        """Writes one event, handed to the operating system at once. NaN and infinities become strings.

        Raises:
            RunError: the disk is full, or the file can't be written any more.
        """
        line = json.dumps(_encode(event), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with writing(self.path):
            end = os.lseek(self._descriptor, 0, os.SEEK_END)
            try:
                write_all(self._descriptor, line)
            except OSError:
                os.ftruncate(self._descriptor, end)
                raise

    def sync(self) -> None:
        """Makes all events durable, so that no checkpoint is ever newer than its record."""
        with writing(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def read_history(path: Path, kinds: Container[str] | None = None) -> list[dict[str, Any]]:
    """Every event in the file, in the order in which it was written; a torn last line is dropped.

    Args:
        path: the record.
        kinds: those that are wanted; lines that begin with another are not looked at. None means all.

    Raises:
        RunError: the file can't be read, or a whole line of it is not an event.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError("a run's record must be readable", f"{error.strerror} at {path}", "check the folder") from error
    events = []
    for number, line in enumerate(content[: _whole(content)].splitlines(), start=1):
        named = _KIND.match(line)
        if kinds is not None and named is not None and named[1].decode() not in kinds:
            continue
        try:
            event = _decode(json.loads(line))
            _check_event(event)
        except (ValueError, RecursionError) as error:
            received = f"line {number} of {path} ({error})"
            raise RunError("each line of a record must be an event", received, "delete that line") from error
        events.append(event)
    return events


def read_record(path: Path) -> list[dict[str, Any]]:
    """The run's story without its accidents: a killed and resumed run reads as one that was never interrupted.

    An event {"kind": "resume", "step": N} takes back what was recorded after step N, and every stop; a later event
    of the same kind and step supersedes the earlier one. Durations are kept apart, under "clock". What
    `omninorm.watch` has added is left out; `omninorm.report.read_run` reads that.
    """
    story: dict[tuple[str, int], dict[str, Any]] = {}
    for event in read_history(path, _NUMBERS):
        if event["kind"] == "resume":
            story = {key: old for key, old in story.items() if key[1] <= event["step"] and key[0] not in _STOPS}
        elif event["kind"] in _NUMBERS:
            story[event["kind"], event["step"]] = event
    return list(story.values())


def _check_event(event: Any) -> None:
    """Raises ValueError unless it is what `Record` writes: a kind, a step, and numbers."""
    if not isinstance(event, dict) or "kind" not in event or "step" not in event:
        raise ValueError("no kind and step")
    if not isinstance(event["kind"], str):
        raise ValueError("a kind that is no name")
    if not isinstance(event["step"], int) or event["step"] < 0:
        raise ValueError("a step that is no count")
    clock = event.get("clock", {})
    if not isinstance(clock, dict):
        raise ValueError("a clock without durations")
    numbers = {**event, **clock} if event["kind"] in _NUMBERS else {}
    for name, value in numbers.items():
        if name not in ("kind", "clock") and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name} is not a number")


def final_status(path: Path) -> str | None:
    """ "finished" or "diverged" once the run of this record has come to its end, else None."""
    kinds = {event["kind"] for event in read_record(path)}
    return next((status for status in ("finished", "diverged") if status in kinds), None)


def _whole(content: bytes) -> int:
    """Length of the content up to and including its last newline."""
    return content.rfind(b"\n") + 1


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) if item.__class__ is not float else item for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
