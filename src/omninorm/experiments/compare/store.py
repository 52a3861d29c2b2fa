"""The folder of a comparison. If the file of a cell exists, the cell is done and never run again, even after a crash.

plan.json           the plan
cells/ID.json       a cell and its outcome, the same in every repetition on the same machine
clock/ID.json       the cell's values that depend on the clock
failed/ID.json      the reason why a cell has no outcome; the cell is run again when the comparison is resumed
damaged/            damaged files; a cell whose outcome or clock was damaged is run again when the comparison is resumed
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omninorm.errors import ConfigError, RunError
from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.outcomes import clock_fault, outcome_fault
from omninorm.experiments.compare.plan import ComparePlan, read_plan
from omninorm.record.files import remove_temporaries, write_file, writing

PLAN_FILE = "plan.json"
_CELLS, _CLOCK, _FAILED, _DAMAGED = "cells", "clock", "failed", "damaged"


class Damage(NamedTuple):
    """A damaged file of a cell.

    Args:
        cell: the cell's id.
        path: the file.
        fault: a sentence without a full stop that names the file and what is wrong with it.
    """

    cell: str
    path: Path
    fault: str

    @property
    def costs_run(self) -> bool:
        """Return whether the cell has to be run again; not so if only the reason of an earlier failure is damaged."""
        return self.path.parent.name != _FAILED


class _DamagedError(RunError):
    """The content of a file is wrong. A file that can't be read is another error."""


class Store:
    """The folder of one comparison. Worker processes also write to it; each cell has its own files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, plan: ComparePlan) -> Store:
        """Create a new folder.

        Raises:
            RunError: the folder is not empty, or can't be written.
            ConfigError: the plan has values that JSON can't represent.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            remedy = f"choose another folder, or continue the comparison in it with --resume {path}"
            raise RunError(f"A new comparison needs a new or an empty folder, but {path} is not empty", "", remedy)
        store, content = cls(path), _plan_as_json(plan)
        with writing(path):
            for name in (_CELLS, _CLOCK, _FAILED):
                (path / name).mkdir(parents=True, exist_ok=True)
            # Written last, because this file makes the folder a comparison.
            write_file(path / PLAN_FILE, content)
        return store

    @classmethod
    def open(cls, path: Path) -> tuple[Store, ComparePlan]:
        """Open an earlier comparison and read its plan.

        Raises:
            RunError: the folder has no comparison.
            ConfigError: the comparison's plan is damaged.
        """
        if not (path / PLAN_FILE).is_file():
            remedy = "use a folder written by omninorm compare"
            if not path.exists():
                raise RunError(f"No such file or folder: {path}", "", remedy)
            raise RunError(f"No comparison found in {path}: it has no {PLAN_FILE}", "", remedy)
        return cls(path), read_plan(path / PLAN_FILE)

    def clean(self) -> None:
        """Remove temporary files of killed processes. Only the holder of the folder's lock may call this."""
        with writing(self.path):
            for folder in (self.path, *(self.path / name for name in (_CELLS, _CLOCK, _FAILED))):
                remove_temporaries(folder)

    def done(self) -> set[str]:
        """Return the ids of the cells that have an outcome.

        Raises:
            RunError: the folder can't be read.
        """
        return set(self._names(_CELLS))

    def damaged(self, cells: Iterable[Cell]) -> list[Damage]:
        """Return the damaged files of these cells.

        Raises:
            RunError: a file can't be read, so it is unknown whether it is damaged.
        """
        found: list[Damage] = []
        for cell in cells:
            for folder, read in ((_CELLS, self.outcome), (_CLOCK, self.clock), (_FAILED, self._failure_of)):
                try:
                    read(cell)
                except _DamagedError as error:
                    found.append(Damage(cell.id, self._path(folder, cell.id), error.invariant))
        return found

    def set_aside(self, cells: Iterable[Cell]) -> None:
        """Move the damaged files of these cells to the folder `damaged`. Only the holder of the lock may call this."""
        for each in self.damaged(cells):
            with writing(self.path):
                (self.path / _DAMAGED).mkdir(exist_ok=True)
                os.replace(each.path, self.path / _DAMAGED / f"{each.path.parent.name}-{each.path.name}")

    def save(self, cell: Cell, measured: Measurement) -> None:
        """Write a cell's outcome."""
        with writing(self.path):
            write_file(self.path / _CLOCK / f"{cell.id}.json", to_json(dict(measured.clock)))
            # Written last, because this file marks the cell as done.
            content = {"cell": cell.to_dict(), "outcome": dict(measured.outcome)}
            write_file(self.path / _CELLS / f"{cell.id}.json", to_json(content))
            (self.path / _FAILED / f"{cell.id}.json").unlink(missing_ok=True)

    def fail(self, cell: Cell, why: str) -> None:
        """Write the reason why a cell has no outcome."""
        with writing(self.path):
            write_file(self.path / _FAILED / f"{cell.id}.json", to_json({"cell": cell.to_dict(), "why": why}))

    def outcome(self, cell: Cell) -> Mapping[str, Any] | None:
        """Return a cell's outcome, or None if it has none.

        Raises:
            RunError: the file is damaged, or can't be read.
        """
        path = self._path(_CELLS, cell.id)
        content = self._read(path)
        if content is None:
            return None
        if not _same(content.get("cell"), json.loads(to_json(cell.to_dict()))):
            raise self._damage(path, "cell: the settings of another run")
        outcome: Mapping[str, Any] = content.get("outcome", {})
        fault = outcome_fault(cell, outcome)
        if fault is not None:
            raise self._damage(path, f"outcome.{fault}")
        return outcome

    def clock(self, cell: Cell) -> Mapping[str, Any]:
        """Return a cell's values that depend on the clock.

        Raises:
            RunError: the file is damaged, or can't be read.
        """
        path = self._path(_CLOCK, cell.id)
        clock: Mapping[str, Any] = self._read(path) or {}
        fault = clock_fault(clock)
        if fault is not None:
            raise self._damage(path, fault)
        return clock

    def failures(self) -> dict[str, str]:
        """Return the reasons why cells have no outcome, by id.

        Raises:
            RunError: a file is damaged, or can't be read.
        """
        reasons = ((name, self._failure(name)) for name in self._names(_FAILED))
        return {name: why for name, why in reasons if why is not None}

    def _failure_of(self, cell: Cell) -> str | None:
        return self._failure(cell.id)

    def _failure(self, name: str) -> str | None:
        path = self._path(_FAILED, name)
        content = self._read(path)
        if content is None:
            return None
        why = content.get("why")
        if not isinstance(why, str):
            raise self._damage(path, "why: not a text")
        return why

    def _path(self, folder: str, name: str) -> Path:
        return self.path / folder / f"{name}.json"

    def _names(self, folder: str) -> list[str]:
        """Return the names of a folder's JSON files. Unlike Path.glob, this raises if the folder can't be read."""
        try:
            return sorted(name.removesuffix(".json") for name in os.listdir(self.path / folder) if _is_json(name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(self.path / folder, error) from error

    def _read(self, path: Path) -> dict[str, Any] | None:
        """Return the JSON object in a file, or None if the file does not exist."""
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damage(path, " ".join(str(error).split())[:200]) from error
        if not isinstance(content, dict):
            raise self._damage(path, "not a JSON object")
        return content

    def _damage(self, path: Path, fault: str) -> RunError:
        remedy = f"run omninorm compare --resume {self.path}: it sets the file aside and repeats the run if necessary"
        return _DamagedError(f"{path} is damaged ({fault})", "", remedy)


def _is_json(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def _unreadable(path: Path, error: OSError) -> RunError:
    remedy = "check the permissions, the disk and the limit of open files, and repeat the command"
    return RunError(f"Cannot read {path}: {error.strerror or error}", "", remedy)


def _same(stored: object, own: Mapping[str, Any]) -> bool:
    """Return whether a stored cell agrees with this one in the keys that both have; versions may have other keys."""
    if not isinstance(stored, dict) or not isinstance(stored.get("norm"), dict):
        return False
    norm, own_norm = stored["norm"], own["norm"]
    return all(norm[key] == own_norm[key] for key in norm.keys() & own_norm.keys()) and all(
        stored[key] == own[key] for key in stored.keys() & own.keys() - {"norm"}
    )


def _plan_as_json(plan: ComparePlan) -> bytes:
    try:
        return to_json(plan.model_dump())
    except (TypeError, ValueError) as error:
        remedy = "write it as a number, or in quotation marks"
        raise ConfigError("The values of a plan must be finite numbers, text or lists", str(error), remedy) from error


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
