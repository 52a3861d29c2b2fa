"""Checks the user's factory in a subprocess, so that a crash or hang does not stop the comparison."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable

import torch

from omninorm.errors import ConfigError, OmninormError
from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.estimate import estimate_seconds
from omninorm.experiments.compare.factory import CPU, check_factory

# Not `-m`, which would put the current folder before the installed packages; see experiments.workers.
_START = """
import sys
sys.path = [path for path in sys.path if path]
from omninorm.experiments.compare.apart import respond
respond()
"""


def probe_in_subprocess(
    name: str, cells: Iterable[Cell], workers: int, time_limit: float, device: torch.device = CPU
) -> float | None:
    """Check the factory and estimate the duration of the cells, in seconds.

    The result is None if the subprocess crashed or took too long. In this case the cells fail one by one and are
    reported.

    Raises:
        ConfigError: as `check_factory`.
    """
    asked = {"name": name, "workers": workers, "device": str(device)}
    request = json.dumps({**asked, "cells": [cell.to_dict() for cell in cells]})
    command, environment = [sys.executable, "-c", _START], {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, env=environment, timeout=time_limit, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode or not done.stdout:
        return None
    answer = json.loads(done.stdout)
    if answer["wrong"]:
        raise ConfigError(*answer["wrong"])
    seconds: float | None = answer["seconds"]
    return seconds


def respond() -> None:
    """Read the request of `probe_in_subprocess` from stdin; write a ConfigError's parts and the seconds to stdout."""
    request = json.load(sys.stdin)
    cells = [Cell.from_dict(cell) for cell in request["cells"]]
    wrong, seconds = None, None
    with contextlib.redirect_stdout(sys.stderr):  # the factory may print
        try:
            check_factory(request["name"], cells)
            with contextlib.suppress(OmninormError):  # the factory may fail for some settings
                seconds = estimate_seconds(cells, request["workers"], torch.device(request["device"]))
        except ConfigError as error:
            wrong = [error.invariant, error.received, error.remedy]
    print(json.dumps({"wrong": wrong, "seconds": seconds}))
