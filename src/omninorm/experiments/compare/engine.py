"""Runs cells on this machine in single-threaded worker processes, each of which takes the next cell when it is free."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Protocol

import torch

from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.crew import name_alone, only_visible
from omninorm.experiments.compare.factory import CPU
from omninorm.experiments.compare.store import Store

# Not `-m`, which would put the current folder before the installed packages; see experiments.workers.
_START = """
import sys
sys.path = [path for path in sys.path if path]
from omninorm.experiments.compare.work import main
main(int(sys.argv[1]), *sys.argv[2:])
"""
TRIES = 2
Look = Callable[[dict[str, float], int, int], bool]
_LOOK_EVERY = 0.5
_START_LIMIT = 120.0  # seconds that a process may take to start, in addition to its cell's time limit


class Runner(Protocol):
    """Runs cells and stores their outcomes, or the reasons why they have none."""

    def run(self, cells: Iterable[Cell], look: Look) -> None:
        """Run all cells, or stop when `look` returns False.

        `look` is called twice a second with the running cells (id → seconds so far) and the numbers of cells that are
        done and that failed. Timed cells run last, one at a time.
        """


class Engine:
    """Runs cells in the given order on `workers` processes, among which the devices are divided.

    A cell that fails or takes longer than `time_limit` seconds is retried once. After a second failure, the reason is
    recorded and the other cells continue.
    """

    def __init__(self, store: Store, workers: int, time_limit: float, devices: Sequence[torch.device] = (CPU,)) -> None:
        self._store, self._count, self._limit, self._devices = store, workers, time_limit, devices
        self._done = self._failed = 0

    def run(self, cells: Iterable[Cell], look: Look) -> None:
        cells = list(cells)
        self._done = self._failed = 0
        timed = [cell for cell in cells if cell.protocol == "speed"]
        if self._run([cell for cell in cells if cell.protocol != "speed"], self._count, look):
            self._run(timed, 1, look)

    def _run(self, cells: list[Cell], count: int, look: Look) -> bool:
        """Run cells; return False if `look` stopped it."""
        waiting = [(cell, 1) for cell in reversed(cells)]
        with self._workers(min(count, len(waiting))) as workers:
            while waiting or any(worker.cell for worker in workers):
                for worker in workers:
                    if worker.cell is None and waiting:
                        worker.take(*waiting.pop())
                for worker, why in self._finished(workers):
                    cell, tries = worker.give()
                    if why is None:
                        self._done += 1
                    elif tries < TRIES:
                        waiting.append((cell, tries + 1))
                    else:
                        self._store.fail(cell, why)
                        self._failed += 1
                running = {w.cell.id: w.seconds for w in workers if w.cell is not None}
                if not look(running, self._done, self._failed):
                    return False
        return True

    def _finished(self, workers: list[_Worker]) -> Iterator[tuple[_Worker, str | None]]:
        """Yield workers whose cell has ended, each with the reason if it failed. Waits up to half a second."""
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                if worker.cell is not None:
                    selector.register(worker.answers, selectors.EVENT_READ, worker)
            ready = {key.data for key, _ in selector.select(_LOOK_EVERY)}
        for worker in workers:
            if worker in ready:
                ended, why = worker.answer()
                if ended:
                    yield worker, why
            elif worker.cell is not None and worker.seconds > self._limit + (0 if worker.is_ready else _START_LIMIT):
                worker.restart()
                yield worker, f"it took longer than {self._limit:.0f} s, the time limit of a run"

    @contextmanager
    def _workers(self, count: int) -> Iterator[list[_Worker]]:
        workers = [_Worker(self._store, self._devices[each % len(self._devices)]) for each in range(count)]
        try:
            yield workers
        finally:
            for worker in workers:
                worker.end()


class _Worker:
    """A worker process and its current cell. Only one GPU is visible to the process."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._device = store, device
        self.cell: Cell | None = None
        self._tries = 0
        self._since = 0.0
        self._start()

    def _start(self) -> None:
        self.is_ready = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in `end`
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(os.getpid()), str(self._store.path), name_alone(self._device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,  # a buffer would hide the second of two lines from the selector
            start_new_session=True,  # Ctrl-C must reach only the parent process
            env={**os.environ, "OMP_NUM_THREADS": "1", **only_visible(self._device)},
        )

    @property
    def answers(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def take(self, cell: Cell, tries: int) -> None:
        """Start a cell."""
        self.cell, self._tries, self._since = cell, tries, time.monotonic()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has died, which `answer` reports
            self._process.stdin.write(json.dumps(cell.to_dict()).encode() + b"\n")
            self._process.stdin.flush()

    def give(self) -> tuple[Cell, int]:
        """Detach and return the current cell and its attempt number."""
        assert self.cell is not None
        cell, self.cell = self.cell, None
        return cell, self._tries

    def answer(self) -> tuple[bool, str | None]:
        """Return whether the cell has ended, and the reason if it failed. A process that has died is restarted."""
        line = self.answers.readline()
        if line:
            message = json.loads(line)
            if "ready" in message:
                self.is_ready, self._since = True, time.monotonic()
                return False, None
            return True, message.get("why")
        code = self._process.wait()
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace").strip().splitlines()
        self.restart()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        memory = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
        return True, f"its process ended ({how}{memory})" + (f": {printed[-1]}" if printed else "")

    def restart(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        """Kill the process; an unfinished cell is run again when the comparison is resumed."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
