"""The first process: it starts the process that measures, restarts it after a crash, and ends it if it hangs."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check.options import BROKEN, NO_DEVICE, arguments, chosen_parts, sizes_of
from gpu_check.results import Results

_MOST_STARTS = 9
_SOURCE = Path(__file__).resolve().parents[2]


def header(options: argparse.Namespace) -> dict[str, Any]:
    """Return everything but the machine on which results depend: the options and the source."""
    files = sorted(
        [*(_SOURCE / "src" / "omninorm").rglob("*.py"), *(_SOURCE / "benchmarks" / "gpu_check").glob("*.py")]
    )
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    peers = None if options.peers is None else sorted(path.name for path in options.peers.glob("*.whl"))
    quick, parts = bool(options.quick), list(options.parts or ())
    return {"device": options.device, "quick": quick, "parts": parts, "peers": peers, "source": digest}


def supervise(options: argparse.Namespace) -> int:
    """Run the check until it is done or its time is over; return 0 if there were no faults, 1 otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # to end the worker as well
    results = Results(options.json, header(options))
    results.forget_failures()
    results.save()
    end = time.time() + sum(sizes_of(options).budgets[name] for name in chosen_parts(options))
    for _ in range(_MOST_STARTS):
        code = _run_worker(options, end)
        results = Results(options.json)
        if code in (0, NO_DEVICE):
            break
        if results.running is None:
            if code != BROKEN:  # it ended between two items, and so would a new process
                failed = {"error": f"the process ended with exit code {code}"}
                results.record("check", "between two items", failed)
                break
        else:
            running = results.running
            results.record(running["part"], running["key"], {"error": _reason(code, running)})
        if time.time() > end:
            break
    return NO_DEVICE if code == NO_DEVICE else _conclude(options, results)


def _run_worker(options: argparse.Namespace, end: float) -> int:
    """Run one process and return its exit code; end the process if an item takes longer than its limit."""
    command = [sys.executable, str(_SOURCE / "benchmarks" / "gpu.py"), *arguments(options), "--worker", str(end)]
    worker = subprocess.Popen(command, start_new_session=True)
    try:
        while worker.poll() is None:
            time.sleep(0.2)
            running = Results(options.json).data.get("running")
            if running and time.time() > min(running["since"] + running["limit"], end + 15):
                break
            if time.time() > end + 20:
                break
    finally:
        _end(worker)
    return worker.returncode


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End a process and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _reason(code: int, running: dict[str, Any]) -> str:
    if time.time() >= running["since"] + running["limit"]:
        return f"took longer than its limit of {running['limit']:.0f} s"
    return f"the process ended with exit code {code}"


def _conclude(options: argparse.Namespace, results: Results) -> int:
    """Print the faults and the path of the results."""
    wrong = []
    for name, part in results.data["parts"].items():
        print(f"{name}: {part['status']}, {len(part['items'])} items in {part['seconds']:.0f} s")
        for key, item in part["items"].items():
            wrong += [f"  {name}, {key}: {text}" for text in [*item.get("wrong", []), *_errors(item)]]
    print("\n".join(wrong) or "Nothing was wrong.")
    print(f"Written to {options.json}")
    return 1 if wrong else 0


def _errors(item: dict[str, Any]) -> list[str]:
    return [f"failed: {item['error']}"] if "error" in item else []
