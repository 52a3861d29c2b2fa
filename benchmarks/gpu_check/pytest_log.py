"""A pytest plugin that writes each test's outcome to a file immediately, so that an aborted run still has its failures.

The environment variable OMNINORM_TEST_LOG names the file. With pytest-xdist only the first process writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "OMNINORM_TEST_LOG"
_LONGEST_TEXT = 1500


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or not (report.failed or report.when == "call"):
        return
    entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        entry["text"] = report.longreprtext[-_LONGEST_TEXT:]
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Return the number of tests that passed, the slowest, and every failure with its short traceback."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    failures = [each for each in entries if each["outcome"] == "failed"]
    slowest = sorted(entries, key=lambda each: -float(each["seconds"]))[:5]
    return {
        "passed": sum(each["outcome"] == "passed" for each in entries),
        "failures": failures,
        "slowest": {each["test"]: each["seconds"] for each in slowest},
        "wrong": [f"{each['test']}: {_reason(each['text'])}" for each in failures],
    }


def _reason(text: str) -> str:
    """Return the first line that pytest marks as the error, or without one the last line."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (marked or lines[-1:] or ["no text"])[0][:300]
