"""Runs cells on Ray: on the cluster that RAY_ADDRESS names, or on a local Ray.

The nodes need the same omninorm and, for a user's own model, its module. The text is sent with the cells, and the
outcomes are sent back: only this process writes to the comparison's folder.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omninorm.device import find_device
from omninorm.errors import MissingExtraError, OmninormError, RunError
from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.engine import TRIES, Look
from omninorm.experiments.compare.protocols import measure as measure_cell
from omninorm.experiments.compare.store import Store
from omninorm.experiments.corpus import Corpus, load_corpus

# Disable Ray's usage reports.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import ray
    from ray.exceptions import RayError
except ImportError as missing:
    raise MissingExtraError(
        "--engine ray needs the package ray", "", 'install it with pip install "omninorm[ray]"'
    ) from missing

_LOOK_EVERY = 0.5


def measure(values: Mapping[str, Any], corpus: Corpus, device: str) -> dict[str, Any]:
    """Return a cell's outcome and clock, or the reason why it has none. This function runs on a node."""
    torch.set_num_threads(1)
    cell = Cell.from_dict(values)
    try:
        measured = measure_cell(cell, corpus, find_device(device))
        return {"outcome": dict(measured.outcome), "clock": dict(measured.clock)}
    except OmninormError as error:
        return {"why": str(error)}
    except Exception as error:  # a failed cell must not end the others
        return {"why": f"{type(error).__name__}: {error}"}


@dataclass
class _Task:
    """A running cell, its attempt number and its start time."""

    cell: Cell
    tries: int
    since: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


class RayEngine:
    """Runs cells like `engine.Engine`, but on Ray.

    Args:
        store: the folder in which outcomes are saved.
        workers: the number of parallel cells, each on one CPU of the cluster. More cells than GPUs share the GPUs.
        time_limit: seconds per cell.
        device: "auto" for the cluster's GPUs, or its CPUs if it has none; "cpu" or "cuda".
    """

    def __init__(self, store: Store, workers: int, time_limit: float, device: str = "auto") -> None:
        self._store, self._count, self._limit, self._device = store, workers, time_limit, device
        self._done = self._failed = 0

    def run(self, cells: Iterable[Cell], look: Look) -> None:
        """See `engine.Runner`.

        Raises:
            RunError: Ray can't be reached or started.
        """
        todo = list(cells)
        self._done = self._failed = 0
        if not todo:
            return
        _start(todo)
        try:
            self._texts = {text: ray.put(load_corpus(text)) for text in {cell.text for cell in todo}}
            timed = [cell for cell in todo if cell.protocol == "speed"]
            if self._run([cell for cell in todo if cell.protocol != "speed"], self._count, look):
                self._run(timed, 1, look)
        finally:
            ray.shutdown()

    def _run(self, cells: list[Cell], count: int, look: Look) -> bool:
        """Run cells; return False if `look` stopped it."""
        share, device = self._share(count)
        remote = ray.remote(num_cpus=1, num_gpus=share, max_retries=0)(measure)
        waiting = [(cell, 1) for cell in reversed(cells)]
        running: dict[Any, _Task] = {}
        while waiting or running:
            while waiting and len(running) < count:
                cell, tries = waiting.pop()
                reference = remote.remote(cell.to_dict(), self._texts[cell.text], device)
                running[reference] = _Task(cell, tries, time.monotonic())
            ready, _ = ray.wait(list(running), num_returns=len(running), timeout=_LOOK_EVERY)
            late = [each for each, task in running.items() if each not in ready and task.seconds > self._limit]
            for reference in [*ready, *late]:
                task = running.pop(reference)
                why = self._take(reference, task.cell, reference in late)
                if why is None:
                    self._done += 1
                elif task.tries < TRIES:
                    waiting.append((task.cell, task.tries + 1))
                else:
                    self._store.fail(task.cell, why)
                    self._failed += 1
            if not look({task.cell.id: task.seconds for task in running.values()}, self._done, self._failed):
                return False
        return True

    def _share(self, workers: int) -> tuple[float, str]:
        """Return the fraction of a GPU that each cell requests, and the name of its device.

        Raises:
            RunError: GPUs are requested, and the cluster has none.
        """
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = resources.get("GPU", 0.0) if self._device != "cpu" else 0.0
        if gpus:
            return min(1.0, math.floor(1e4 * gpus / workers) / 1e4), "cuda"
        if self._device.startswith("cuda"):
            raise RunError("Ray's cluster has no GPU", "", "add a node with one, or use --device cpu")
        return 0.0, "cpu"

    def _take(self, reference: Any, cell: Cell, late: bool) -> str | None:
        """Store an outcome, or return the reason why the cell has none."""
        if late:
            ray.cancel(reference, force=True)
            return f"it took longer than {self._limit:.0f} s, the time limit of a run"
        try:
            answer = ray.get(reference)
        except RayError as error:
            return f"its process ended: {' '.join(str(error).split())[:300]}"
        if "why" in answer:
            return str(answer["why"])
        self._store.save(cell, Measurement(answer["outcome"], answer["clock"]))
        return None


def _start(cells: list[Cell]) -> None:
    """Connect to a cluster, or start a local Ray."""
    variables = {"OMP_NUM_THREADS": "1"}
    if any(cell.model for cell in cells):
        known = os.environ.get("PYTHONPATH", "")
        variables["PYTHONPATH"] = os.pathsep.join(path for path in (known, str(Path.cwd())) if path)
    own: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables}, **own)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"Cannot connect to Ray: {reason}", "", "check RAY_ADDRESS, or use --engine local") from error
