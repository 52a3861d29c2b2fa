"""Processes that compile what the timed parts need while the numerics are checked. Compilers keep results on disk."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check import place
from gpu_check.options import arguments, chosen_parts, sizes_of

_PARTS = ("training", "speed")
_ENTRY = Path(__file__).resolve().parents[1] / "gpu.py"


class Warmers:
    """The processes, on a GPU only. They end with the block at the latest."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        if options.device == "cuda" and set(_PARTS) & set(chosen_parts(options)):
            count = max(1, min(12, (os.cpu_count() or 1) - 2))
            self._processes = [_start(options, f"{number}/{count}") for number in range(count)]

    def __enter__(self) -> Warmers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait(self, until: float) -> None:
        """Wait for all processes, or until that time."""
        while time.time() < until and any(each.poll() is None for each in self._processes):
            time.sleep(0.1)

    def end(self) -> None:
        for each in self._processes:
            each.kill()
            each.wait()
        self._processes = []


def _start(options: argparse.Namespace, share: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(_ENTRY), *arguments(options), "--warm", share]
    # The first shares begin with a model, which has many kernels.
    threads = "4" if int(share.split("/")[0]) < len(place.model_backends(options.device)) + 1 else "1"
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def warm(options: argparse.Namespace) -> int:
    """Compile one share of the jobs; failures appear again when they are measured."""
    place.prepare(options.device)
    importlib.import_module("gpu_check.peers").load(options.peers)
    number, count = map(int, options.warm.split("/"))
    jobs: list[Any] = []
    for name in _PARTS:
        if name in chosen_parts(options):
            jobs += importlib.import_module(f"gpu_check.{name}").warming(options.device, sizes_of(options))
    for job in jobs[number::count]:
        try:
            job()
        except Exception as failure:
            print(failure, file=sys.stderr)
    return 0
