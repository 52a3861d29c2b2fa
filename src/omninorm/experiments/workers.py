"""Runs that go on beside each other, one process of one thread each: on small models far better than two threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omninorm.errors import RunError

LOG_FILE = "train.log"


class Workers:
    """Trains runs in processes of `omninorm train --resume`, at most `count` at a time, in the order given.

    Entered as a context manager: on leaving early, those at work are asked to stop, and leave a checkpoint.
    """

    def __init__(self, runs: Sequence[Path], count: int) -> None:
        self._waiting = list(runs)
        self._count = count
        self._working: dict[Path, subprocess.Popen[bytes]] = {}

    def advance(self) -> bool:
        """Starts what can be started; false once nothing is left to do.

        Raises:
            RunError: a process failed; what it said last is in the message.
        """
        for run, process in list(self._working.items()):
            code = process.poll()
            if code is not None:
                del self._working[run]
                # 1 means that the training diverged, which is a result.
                if code not in (0, 1):
                    raise RunError("each run must come to its end", _explain(run, code), "see the log, then resume")
        while self._waiting and len(self._working) < self._count:
            self._start(self._waiting.pop(0))
        return bool(self._working)

    def _start(self, run: Path) -> None:
        command = [sys.executable, "-m", "omninorm", "train", "--resume", str(run)]
        # A session of its own, so that a Ctrl-C reaches it once, from us.
        with open(run / LOG_FILE, "ab") as log:
            self._working[run] = subprocess.Popen(
                command,
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


def _explain(run: Path, code: int) -> str:
    lines = (run / LOG_FILE).read_text(errors="replace").strip().splitlines()
    return f"exit code {code} of {run} ({lines[-1] if lines else 'it said nothing'})"
