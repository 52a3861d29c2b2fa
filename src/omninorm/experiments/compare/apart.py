"""The user's factory, looked at in a process of its own: what ends or hangs there must not end the comparison."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable

from omninorm.errors import ConfigError, OmninormError
from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.estimate import estimate_seconds
from omninorm.experiments.compare.factory import check_factory

# As in experiments.workers: not `-m`, which would put the current folder before the installed packages.
_START = """
import sys
sys.path = [path for path in sys.path if path]
from omninorm.experiments.compare.apart import answer
answer()
"""


def look_apart(name: str, cells: Iterable[Cell], workers: int, time_limit: float) -> float | None:
    """Checks the factory and estimates the time that the cells take, seconds; None where that could not be found out:
    the cells then fail one by one, and are reported.

    Raises:
        ConfigError: as `check_factory`.
    """
    told = json.dumps({"name": name, "cells": [cell.to_dict() for cell in cells], "workers": workers})
    command, environment = [sys.executable, "-c", _START], {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, input=told, capture_output=True, text=True, env=environment, timeout=time_limit, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode or not done.stdout:
        return None
    found = json.loads(done.stdout)
    if found["wrong"]:
        raise ConfigError(*found["wrong"])
    seconds: float | None = found["seconds"]
    return seconds


def answer() -> None:
    """What `look_apart` asks, from stdin; what is wrong, as a ConfigError's parts, and the seconds go to stdout."""
    told = json.load(sys.stdin)
    cells = [Cell.from_dict(cell) for cell in told["cells"]]
    wrong, seconds = None, None
    with contextlib.redirect_stdout(sys.stderr):  # what the factory prints is no answer
        try:
            check_factory(told["name"], cells)
            with contextlib.suppress(OmninormError):  # it fails for some settings
                seconds = estimate_seconds(cells, told["workers"])
        except ConfigError as error:
            wrong = [error.invariant, error.received, error.remedy]
    print(json.dumps({"wrong": wrong, "seconds": seconds}))
