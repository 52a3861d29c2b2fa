"""Measures how two processes scale: `python benchmarks/scaling.py [--rounds 5]`, on a machine with two free cores.

`omninorm train` trains a decoder with 4.8 million parameters and one thread per process: first one process with a batch
of 8, then two processes under torchrun with a batch of 16, so that each has the same work. The efficiency of a round is
the ratio of their median step times. It would be 1 if averaging gradients took no time and the cores shared no
resources.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from omninorm.record import read_record

OPTIONS = [
    *("--d-model", "256", "--layers", "6", "--heads", "4", "--seq-len", "128", "--steps", "15", "--log-every", "1"),
    *("--eval-every", "1000", "--checkpoint-every", "1000", "--eval-bytes", "2000", "--no-watch"),
]
SKIPPED = 5  # the number of steps until everything has been allocated


def step_seconds(processes: int, folder: Path) -> float:
    """Train, and return the median duration of a step."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(together if processes > 1 else []), "-m", "omninorm", "train", *OPTIONS]
    command += ["--batch-size", str(8 * processes), "--out", str(folder)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    tokens = 8 * processes * 128
    steps = [event for event in read_record(folder / "record.jsonl") if event["kind"] == "step"]
    rates = [event["clock"]["tokens_per_second"] for event in steps]
    return statistics.median(tokens / rate for rate in rates[SKIPPED:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found = []
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            one, two = (step_seconds(count, Path(folder) / str(count)) for count in (1, 2))
        found.append(one / two)
        print(f"round {number}: one process {one:.3f} s a step, two {two:.3f} s: {found[-1]:.2f}", flush=True)
    print(f"efficiency {statistics.median(found):.2f} (median of {rounds}, {min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
