"""Writes events to record.jsonl in a folder, or to memory. A disk error ends the recording, never the training."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from omninorm.errors import OmninormError
from omninorm.record import RECORD_FILE, Record, read_history

DIGITS = 4
_ROUNDED = f"%.{DIGITS}g "


def rank() -> int:
    """Return this process's rank in a distributed run, otherwise 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def record_name(of_rank: int) -> str:
    """Return the name of a rank's record. Rank 0 writes the record of the run."""
    return RECORD_FILE if of_rank == 0 else f"record-rank{of_rank}.jsonl"


class Output:
    """Appends events to a record, and keeps in memory those that are in no file.

    Args:
        target: a folder, which is created; a Record that the caller closes; or None to keep events in memory.
    """

    def __init__(self, target: str | Path | Record | None) -> None:
        self._kept: list[dict[str, Any]] = []
        self._path: Path | None = None
        self.folder: Path | None = None
        self._record: Record | None = None
        self._ours = not isinstance(target, Record)
        self.continues = False
        if isinstance(target, Record):
            self._record, self.folder = target, target.path.parent
        elif target is not None:
            self.folder = Path(target)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self._give_up(f"cannot create {self.folder}: {error.strerror}")
                return
            path = self.folder / record_name(rank())
            self.continues = path.exists() and path.stat().st_size > 0
            try:
                self._record = Record(path)
            except OmninormError as error:
                self._give_up(str(error))

    def append(self, event: Mapping[str, Any]) -> None:
        """Append one event."""
        if self._record is not None:
            try:
                self._record.append(event)
                self._path = self._record.path
                return
            except (OmninormError, ValueError) as error:  # ValueError: a name that is not valid Unicode
                self._give_up(str(error))
        self._kept.append(dict(event))

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events so far: those in the file, including earlier ones, and after a disk error those in memory."""
        written: list[dict[str, Any]] = []
        if self._path is not None:
            try:
                written = read_history(self._path)
            except OmninormError as error:
                warnings.warn(f"The record can no longer be read: {error}", stacklevel=3)
        return [*written, *self._kept]

    @contextmanager
    def file(self) -> Iterator[Path]:
        """Provide all events as a record file; a temporary one if they are not all in a file."""
        if self._path is not None and not self._kept:
            yield self._path
            return
        with tempfile.TemporaryDirectory() as temporary:
            # The page of a run without a name is named after the folder.
            folder = Path(temporary) / (self.folder.resolve().name if self.folder else "")
            folder.mkdir(exist_ok=True)
            record = Record(folder / RECORD_FILE)
            for event in self.events:
                record.append(event)
            record.close()
            yield record.path

    def close(self) -> None:
        if self._record is not None and self._ours:
            self._record.close()
        self._record = None

    def _give_up(self, reason: str) -> None:
        self.close()
        warnings.warn(f"omninorm.watch has stopped recording, training continues: {reason}", stacklevel=2)


def short(values: Any) -> list[float | None]:
    """Round to four significant digits, more than a statistic of some rows is accurate to."""
    known = [value for value in values if value is not None]
    # One format for all of them takes half the time of one for each.
    rounded = map(float, (_ROUNDED * len(known) % tuple(known)).split())
    return [None if value is None else next(rounded) for value in values]
