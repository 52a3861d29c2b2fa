"""Trains several runs in parallel, each in a single-threaded process; for small models, threads are far slower."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from omninorm.errors import RunError
from omninorm.record import RECORD_FILE, final_status

LOG_FILE = "train.log"

# Not `-m omninorm`, which would put the current folder, and any torch.py in it, before the installed packages.
_START = """
import sys
sys.path = [path for path in sys.path if path]
from omninorm.experiments.workers import end_with_parent
end_with_parent(int(sys.argv[1]))
from omninorm.cli import main
main(sys.argv[2:])
"""
_SECONDS_BETWEEN_LOOKS = 1.0


class Workers:
    """Train runs in processes of `omninorm train --resume`, at most `count` at a time, in the order given.

    The runs are assigned to `devices` in turn; if there are none, each run uses its recorded device.

    Use it as a context manager: on an early exit, running processes are stopped and save a checkpoint.
    """

    def __init__(self, runs: Sequence[Path], count: int, devices: Sequence[torch.device] = ()) -> None:
        self._waiting = list(runs)
        self._devices = itertools.cycle(devices)
        self._count = count
        self._working: dict[Path, subprocess.Popen[bytes]] = {}

    def advance(self) -> bool:
        """Start waiting runs if fewer than `count` are running; return False once all runs are done.

        Raises:
            RunError: a process ended before its run was done; the message contains its last line of output.
        """
        for run, process in list(self._working.items()):
            code = process.poll()
            if code is not None:
                del self._working[run]
                if final_status(run / RECORD_FILE) is None:
                    remedy = f"see {run / LOG_FILE}, then resume"
                    raise RunError(f"The process of {run} ended too early ({_explain(run, code)})", "", remedy)
        while self._waiting and len(self._working) < self._count:
            self._start(self._waiting.pop(0))
        return bool(self._working)

    def _start(self, run: Path) -> None:
        device = next(self._devices, None)
        place = [] if device is None else ["--device", str(device)]
        arguments = [str(os.getpid()), "train", "--resume", str(run), *place]
        # A new session, so that the process receives Ctrl-C only once, from this process.
        with open(run / LOG_FILE, "ab") as log:
            self._working[run] = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._working.values():
            process.send_signal(signal.SIGTERM)
        for process in self._working.values():
            process.wait()


def end_with_parent(parent: int) -> None:
    """Send SIGTERM to this process when its parent process has ended, so that it saves a checkpoint."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _explain(run: Path, code: int) -> str:
    lines = (run / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit code {code}, {lines[-1].rstrip('.') if lines else 'no output'}"
