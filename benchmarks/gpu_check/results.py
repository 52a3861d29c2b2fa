"""The JSON file of the check. After every item it is written under a temporary name and renamed, so it stays whole."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

SCHEMA = 2


class Results:
    """The results by part and item.

    Args:
        path: the file. If it has results with the same header, they are continued; any other file is first renamed to
            NAME.old.
        header: everything on which the results depend, as JSON values; None continues any file.
    """

    def __init__(self, path: Path, header: dict[str, Any] | None = None) -> None:
        self.path = path
        self.data = _read(path)
        if header is not None and self.data.get("header") != header:
            if path.exists():
                os.replace(path, path.with_name(path.name + ".old"))
            self.data = {"schema": SCHEMA, "header": header, "machine": {}, "parts": {}, "running": None}
            self.save()

    @property
    def running(self) -> dict[str, Any] | None:
        """The item that has been started but not recorded: its part, key, start time and limit in seconds."""
        return self.data["running"]  # type: ignore[no-any-return]

    def part(self, name: str) -> dict[str, Any]:
        """Return a part: its status, seconds and items."""
        empty: dict[str, Any] = {"status": "started", "seconds": 0.0, "items": {}}
        return self.data["parts"].setdefault(name, empty)  # type: ignore[no-any-return]

    def forget_failures(self) -> None:
        """Remove the items that failed or did not run, so that they run again."""
        for part in self.data["parts"].values():
            part["items"] = {key: item for key, item in part["items"].items() if "error" not in item}
            part["status"] = "done" if part["status"] == "done" else "started"
        self.data["running"] = None

    def start(self, part: str, key: str, limit: float) -> None:
        self.data["running"] = {"part": part, "key": key, "since": time.time(), "limit": limit}
        self.save()

    def record(self, part: str, key: str, value: dict[str, Any]) -> None:
        running, entry = self.data["running"], self.part(part)
        seconds = time.time() - running["since"] if running else 0.0
        entry["items"][key] = {**value, "seconds": round(seconds, 2)}
        entry["seconds"] = round(entry["seconds"] + seconds, 2)
        self.data["running"] = None
        self.save()

    def finish(self, part: str, status: str) -> None:
        """Set a part's status: "done", "out of time", or "left out: …"."""
        self.part(part)["status"] = status
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        temporary.write_text(json.dumps(_finite(self.data), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else {}


def _finite(value: Any) -> Any:
    """Return the value, with texts such as "nan" in place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
