"""Where events go: record.jsonl in a folder, and memory. A disk that fails ends the recording, never the training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from omninorm.errors import OmninormError
from omninorm.record import RECORD_FILE, Record

DIGITS = 4


def rank() -> int:
    """This process's number in a distributed run, 0 otherwise."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def record_name(of_rank: int) -> str:
    """The record's file: each rank has its own, rank 0 the run's."""
    return RECORD_FILE if of_rank == 0 else f"record-rank{of_rank}.jsonl"


class Output:
    """Keeps events and appends them to a record.

    Args:
        target: a folder, which is made; a Record that someone else closes; or None for memory alone.
    """

    def __init__(self, target: str | Path | Record | None) -> None:
        self.events: list[dict[str, Any]] = []
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
                self._give_up(f"{error.strerror} at {self.folder}")
                return
            path = self.folder / record_name(rank())
            self.continues = path.exists() and path.stat().st_size > 0
            try:
                self._record = Record(path)
            except OmninormError as error:
                self._give_up(str(error))

    def append(self, event: Mapping[str, Any]) -> None:
        """One event. Numbers in samples are rounded to four significant digits."""
        self.events.append(dict(event))
        if self._record is None:
            return
        try:
            self._record.append(event)
        except OmninormError as error:
            self._give_up(str(error))

    def close(self) -> None:
        if self._record is not None and self._ours:
            self._record.close()
        self._record = None

    def _give_up(self, reason: str) -> None:
        self.close()
        warnings.warn(f"omninorm.watch records no more, training goes on: {reason}", stacklevel=2)


def short(values: Any) -> list[float | None]:
    """Numbers at four significant digits, which is more than a statistic of some rows knows."""
    return [None if value is None else float(f"{value:.{DIGITS}g}") for value in values]
