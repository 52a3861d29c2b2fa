"""Variants of a training run that alternate, each in a separate process, so that none changes another's caches.

A process builds its model, trains a few steps, and reports "ready". For each line of its input it trains one block and
writes the seconds per step. At the end of its input it writes its counters and warnings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from gpu_check import place
from gpu_check.items import sentences
from gpu_check.options import arguments, sizes_of

COMPILED = ", compiled"
_ENTRY = Path(__file__).resolve().parents[1] / "gpu.py"
_MARK = "variant: "  # the start of our lines; libraries may print others
_WARM_UP = 3


class Variant:
    """The process of one variant, as the process that measures uses it."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        command = [sys.executable, str(_ENTRY), *arguments(options), "--variant", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def block(self) -> float:
        """Let the process train a block; return the seconds per step."""
        assert self._process.stdin is not None
        self._process.stdin.write("block\n")
        self._process.stdin.flush()
        return float(self.read()["seconds"])

    def finish(self) -> dict[str, Any]:
        """Close the input of the process; return its counters and warnings."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        found = self.read()
        self._process.wait()
        return found

    def read(self) -> dict[str, Any]:
        """Return the next message; raise RuntimeError if the process reports an error, or ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(_MARK))
                if "error" in found:
                    raise RuntimeError(found["error"])
                return found
        raise RuntimeError(f"the process ended with exit code {self._process.wait()}")

    def end(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError), self._process:  # closes the pipes, and waits for the process
            pass


def take_turns(
    options: argparse.Namespace, names: list[str], blocks: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]], dict[str, str]]:
    """Return the seconds per step of every variant in every round, the counters, and the reasons of failures."""
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        variants = {name: Variant(options, name) for name in names}
        for variant in variants.values():
            stack.callback(variant.end)
        for name in names:
            try:
                variants[name].read()
            except (RuntimeError, OSError) as failure:  # the others are still compared
                failed[name] = " ".join(str(failure).split())[:300]
                del variants[name]
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(blocks):
            for name in random.sample(list(variants), len(variants)):
                seconds[name].append(variants[name].block())
        return seconds, {name: variant.finish() for name, variant in variants.items()}, failed


# The process of a variant -------------------------------------------------------------------------------------------


def run_variant(options: argparse.Namespace) -> int:
    """Train the variant that the option names, in this process, and report to the process that measures."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            found = _train(options)
        except Exception as failure:
            _send({"error": f"{type(failure).__name__}: {failure}"})
            return 1
    _send({**found, "warnings": sentences(caught)})
    return 0


def _train(options: argparse.Namespace) -> dict[str, Any]:
    """Train a block for each line of the input; return the memory and the number of graphs that Dynamo compiled."""
    from gpu_check.training import first_model, trained

    place.prepare(options.device)
    sizes = sizes_of(options)
    name, compiled = options.variant.removesuffix(COMPILED), options.variant.endswith(COMPILED)
    variant = trained(name, first_model(sizes, options.device), options.device, sizes, compiled)

    def block(steps: int) -> float:
        return place.wall(lambda: [variant.step() for _ in range(steps)], options.device) / steps

    block(_WARM_UP)
    first = _graphs()
    _send({"ready": True})
    for _ in sys.stdin:
        _send({"seconds": block(sizes.steps)})
    gib = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None
    breaks = [str(reason)[:300] for reason in counters["graph_break"]]
    return {"memory_gib": gib, "graphs": first, "recompiled": _graphs() - first, "graph_breaks": breaks}


def _graphs() -> int:
    """Return the number of graphs that Dynamo has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def _send(message: dict[str, Any]) -> None:
    print(_MARK + json.dumps(message), flush=True)
