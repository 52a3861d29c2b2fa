"""Runs each group of jobs in its own process, whose environment sets threads and allocator.

With its default thresholds, glibc returns the memory of every large result to the system and then requests it again.
Each page then costs a page fault, and these faults take several times as long as a norm. The allocator "raised" has
higher thresholds, so that the operators are measured without these faults; "default" includes them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from omninorm.bench.buffers import last_level_cache_bytes
from omninorm.bench.config import BenchConfig
from omninorm.bench.plan import Group, plan
from omninorm.bench.targets import find_losses, judge
from omninorm.errors import RunError
from omninorm.experiments.provenance import git_commit, version_of, versions
from omninorm.kernels.dispatch import backends

SCHEMA = 1
THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**30), "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30)}
# Not `-m`, which would put the current folder, and any torch.py in it, before the installed packages.
_START = """
import sys
sys.path = [path for path in sys.path if path]
from omninorm.experiments.workers import end_with_parent
end_with_parent(int(sys.argv[1]))
from omninorm.bench.worker import main
main()
"""

# A function that is called with the current job, the number of finished jobs and the total.
Progress = Callable[[str, int, int], None]


def measure_all(config: BenchConfig, progress: Progress) -> dict[str, Any]:
    """Measure everything and return the result as JSON values, including targets and losses.

    Raises:
        RunError: a measuring process failed; the message contains its last output.
    """
    result = new_result(config)
    groups = plan(config)
    total = sum(len(group.jobs) for group in groups)
    done = 0
    for group in groups:
        where = f"{group.threads} thread{'s' if group.threads > 1 else ''}, {group.allocator} allocator"
        for number, event in enumerate_started(_events(config, group)):
            if event["event"] == "started":
                progress(f"{event['what']}, {where}", done + number - 1, total)
            else:
                add_event(result, event)
        done += len(group.jobs)
    progress("done", total, total)
    return {**result, "targets": judge(result), "losses": find_losses(result)}


def new_result(config: BenchConfig) -> dict[str, Any]:
    """Return a result without measurements."""
    return {
        "schema": SCHEMA,
        "versions": {**versions(), "onnxruntime": version_of("onnxruntime")},
        "commit": git_commit(),
        "backends": [backend._asdict() for backend in backends()],
        "cache_bytes": last_level_cache_bytes(),
        "settings": config.to_dict(),
        "ratio": "median over rounds of (our time / the other's time in the same round)",
        "allocators": {"raised": THRESHOLDS, "default": {}},
        "measurements": [],
        "kept": [],
        "skipped": [],
    }


def add_event(result: dict[str, Any], event: dict[str, Any]) -> None:
    """Add a process's event to the result."""
    place = {"measured": "measurements", "kept": "kept", "skipped": "skipped"}[event["event"]]
    entry = {name: value for name, value in event.items() if name != "event"}
    if entry not in result[place]:
        result[place].append(entry)


def enumerate_started(events: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every event with the number of jobs that have started so far, including the event's job."""
    started = 0
    for event in events:
        started += event["event"] == "started"
        yield started, event


def environment(group: Group) -> dict[str, str]:
    """Return the environment of this process with the group's number of threads and allocator thresholds."""
    kept = {name: value for name, value in os.environ.items() if name not in THRESHOLDS}
    raised = THRESHOLDS if group.allocator == "raised" else {}
    return {**kept, **raised, "OMP_NUM_THREADS": str(group.threads), "TRANSFORMERS_VERBOSITY": "error"}


def _events(config: BenchConfig, group: Group) -> Iterator[dict[str, Any]]:
    request = {"config": config.to_dict(), "threads": group.threads, "allocator": group.allocator, "jobs": group.jobs}
    with tempfile.TemporaryFile() as errors, _process(group, errors) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        if process.wait() != 0:
            errors.seek(0)
            printed = errors.read().decode(errors="replace").strip().splitlines()
            last = f": {printed[-1]}" if printed else " without a message"
            remedy = "leave out the case that failed, or report the error"
            raise RunError(f"A measuring process failed with exit code {process.returncode}{last}", "", remedy)


@contextmanager
def _process(group: Group, errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process in a new session, so that Ctrl-C reaches only the parent, and end it on exit."""
    process = subprocess.Popen(
        [sys.executable, "-c", _START, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
        env=environment(group),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
