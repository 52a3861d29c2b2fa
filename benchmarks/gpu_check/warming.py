"""Processes that compile kernels in parallel before they are checked and timed. The compilers cache results on disk.

All jobs are in one sequence: those of numerics, of training, and of speed. Each process takes the next job that no
other process has taken.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpu_check import place
from gpu_check.options import arguments, chosen_parts, sizes_of

PARTS = ("numerics", "training", "speed")
_MOST_PROCESSES = 16
_ENTRY = Path(__file__).resolve().parents[1] / "gpu.py"


class Jobs:
    """The jobs that have been taken and finished, as files in a folder that all processes share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, name: str) -> bool:
        """Take a job; return False if another process has taken it before."""
        try:
            os.close(os.open(self.folder / f"{name} taken", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def finish(self, name: str) -> None:
        (self.folder / f"{name} done").touch()

    def done(self, part: str) -> int:
        """Return the number of finished jobs of a part."""
        return sum(1 for _ in self.folder.glob(f"{part} * done"))


class Warmers:
    """The processes that compile, only with a GPU. They end at the end of the block at the latest."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="omninorm-warm-")
        self._jobs = Jobs(Path(self._folder.name))
        self._processes: list[subprocess.Popen[bytes]] = []
        if options.device == "cuda" and set(PARTS) & set(chosen_parts(options)):
            count = max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) - 1))
            self._processes = [_start(options, self._folder.name) for _ in range(count)]

    def __enter__(self) -> Warmers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._folder.cleanup()

    def wait(self, part: str, until: float) -> str:
        """Wait until a part's jobs are done, the processes have ended, or the time is over; return a text to print."""
        if not self._processes:
            return ""
        start, count = time.time(), len(_jobs(self._options, part))
        if not count:
            return ""
        while time.time() < until and self._jobs.done(part) < count and self._working():
            time.sleep(0.1)
        seconds = time.time() - start
        return f"waited {seconds:.0f} s for {self._jobs.done(part)} of {count} jobs of the compilers of {part}"

    def _working(self) -> bool:
        return any(each.poll() is None for each in self._processes)

    def end(self) -> None:
        for each in self._processes:
            each.kill()
            each.wait()
        self._processes = []


def _start(options: argparse.Namespace, folder: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(_ENTRY), *arguments(options), "--warm", folder]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _jobs(options: argparse.Namespace, part: str) -> list[Callable[[], object]]:
    if part not in chosen_parts(options):
        return []
    found: list[Callable[[], object]] = importlib.import_module(f"gpu_check.{part}").warming(
        options.device, sizes_of(options)
    )
    return found


def warm(options: argparse.Namespace) -> int:
    """Compile jobs until none is left; failures occur again when the part is measured."""
    place.prepare(options.device)
    importlib.import_module("gpu_check.peers").load(options.peers)
    from torch._inductor import config

    jobs = Jobs(options.warm)
    for part in PARTS:
        config.compile_threads = 4 if part == "training" else 1  # a model has many kernels
        for number, job in enumerate(_jobs(options, part)):
            if jobs.take(f"{part} {number}"):
                with contextlib.suppress(Exception):
                    job()
                jobs.finish(f"{part} {number}")
    return 0
