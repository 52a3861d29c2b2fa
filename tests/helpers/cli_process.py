"""Processes that run the real command line without importing torch each time.

A fork server imports everything once; each process is a fork of it, with a process id to send signals to, exactly as
`python -m omninorm` has, and its own stdout and stderr in files.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from helpers import fork_server
from helpers.waiting import PATIENCE


class Process:
    """`omninorm` with some arguments, running; `environment` is added to the environment variables."""

    def __init__(self, folder: Path, *arguments: object, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self._streams = (folder / "stdout", folder / "stderr")
        target, given = _run, ([str(a) for a in arguments], *map(str, self._streams), dict(environment))
        self._process = fork_server.context().Process(target=target, args=given)
        # One thread: several processes share the cores, which OpenMP's waiting threads would use up. The server also
        # inherits this if it starts now.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            self._process.start()

    def running(self) -> bool:
        return self._process.exitcode is None

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, seconds: float = PATIENCE) -> tuple[int, str, str]:
        """Exit code (negative: killed by that signal), stdout and stderr."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "the process is still running"
        out, err = (path.read_text(encoding="utf-8") for path in self._streams)
        return self._process.exitcode, out, err

    def end(self) -> None:
        if self.running():
            self._process.kill()
        self._process.join()
        self._process.close()


def _run(arguments: list[str], out: str, err: str, environment: dict[str, str]) -> None:
    """Runs in the new process."""
    os.environ.update(environment)
    for stream, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
    # A shell disables it for programs in the background, such as these tests, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from omninorm.cli import main

    main(arguments)
