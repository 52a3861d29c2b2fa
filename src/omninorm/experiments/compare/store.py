"""A comparison's folder. A cell that has its file is done and never run again, whatever killed the process before.

plan.json           what is compared
cells/ID.json       a cell and its outcome, the same in every repetition on the same machine
clock/ID.json       what of it depends on the clock
failed/ID.json      why a cell has no outcome; tried again when the comparison is resumed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omninorm.errors import ConfigError, RunError
from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.plan import ComparePlan, parse_plan
from omninorm.record.files import remove_temporaries, write_file, writing

PLAN_FILE = "plan.json"
_CELLS, _CLOCK, _FAILED = "cells", "clock", "failed"


class Store:
    """The folder of one comparison. Worker processes write into it, too: each cell has files of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, plan: ComparePlan) -> Store:
        """Makes a new folder.

        Raises:
            RunError: it has something in it, or can't be written.
            ConfigError: the plan has values that JSON has no words for.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            remedy = "choose another folder, or go on with --resume"
            raise RunError("a new comparison needs an empty or a new folder", str(path), remedy)
        store, content = cls(path), _plan_as_json(plan)
        with writing(path):
            for name in (_CELLS, _CLOCK, _FAILED):
                (path / name).mkdir(parents=True, exist_ok=True)
            # Last, since it is what makes the folder a comparison.
            write_file(path / PLAN_FILE, content)
        return store

    @classmethod
    def open(cls, path: Path) -> tuple[Store, ComparePlan]:
        """An earlier comparison, and its plan.

        Raises:
            RunError: there is none, or its plan is damaged.
        """
        store = cls(path)
        plan = parse_plan(store._read(path / PLAN_FILE, "a comparison has a plan.json"), str(path / PLAN_FILE))
        return store, plan

    def clean(self) -> None:
        """Removes what killed processes left. Only for the holder of the folder's lock."""
        with writing(self.path):
            for folder in (self.path, *(self.path / name for name in (_CELLS, _CLOCK, _FAILED))):
                remove_temporaries(folder)

    def done(self) -> set[str]:
        """The ids of the cells that have an outcome."""
        return {path.stem for path in (self.path / _CELLS).glob("*.json")}

    def save(self, cell: Cell, measured: Measurement) -> None:
        """Keeps a cell's outcome."""
        with writing(self.path):
            write_file(self.path / _CLOCK / f"{cell.id}.json", to_json(dict(measured.clock)))
            # Last, since it is what makes the cell done.
            content = {"cell": cell.to_dict(), "outcome": dict(measured.outcome)}
            write_file(self.path / _CELLS / f"{cell.id}.json", to_json(content))
            (self.path / _FAILED / f"{cell.id}.json").unlink(missing_ok=True)

    def fail(self, cell: Cell, why: str) -> None:
        """Notes why a cell has no outcome."""
        with writing(self.path):
            write_file(self.path / _FAILED / f"{cell.id}.json", to_json({"cell": cell.to_dict(), "why": why}))

    def outcome(self, cell: Cell) -> Mapping[str, Any] | None:
        """A cell's outcome, None where it has none."""
        path = self.path / _CELLS / f"{cell.id}.json"
        if not path.exists():
            return None
        outcome: Mapping[str, Any] = self._read_cell(path, "outcome", dict)
        return outcome

    def clock(self, cell: Cell) -> Mapping[str, Any]:
        path = self.path / _CLOCK / f"{cell.id}.json"
        clock: Mapping[str, Any] = self._read_cell(path) if path.exists() else {}
        return clock

    def failures(self) -> dict[str, str]:
        """Why cells have no outcome, by id."""
        found = sorted((self.path / _FAILED).glob("*.json"))
        return {path.stem: self._read_cell(path, "why", str) for path in found}

    def _read_cell(self, path: Path, name: str | None = None, kind: type = object) -> Any:
        """An object from a cell's file, or one of its values."""
        found = self._read(path, "a cell's file must be whole")
        if not isinstance(found, dict) or (name is not None and not isinstance(found.get(name), kind)):
            remedy = "delete it, and --resume runs that cell again"
            raise RunError("a cell's file must be whole", f"another content in {path}", remedy)
        return found if name is None else found[name]

    def _read(self, path: Path, invariant: str) -> Any:
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(invariant, f"{error} at {path}", "name a folder that `omninorm compare` wrote") from error


def _plan_as_json(plan: ComparePlan) -> bytes:
    try:
        return to_json(plan.model_dump())
    except (TypeError, ValueError) as error:
        remedy = "write it as a number, or in quotation marks"
        raise ConfigError("a plan's values must be finite numbers, words or lists", str(error), remedy) from error


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
