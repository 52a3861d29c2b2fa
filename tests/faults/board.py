"""The board: runs the plan, appends each result to a file, and writes the page.

python -m faults.board --workers 2          # all runs; interrupt it at any time and start it again to continue
python -m faults.board --split calibration --limit 200
python -m faults.board --page               # only write docs/faults.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from faults.architectures import ARCHITECTURES
from faults.baselines import anomaly_step, overflow_step
from faults.faults import load_faults
from faults.page import text_of
from faults.plan import SEEDS, grouped, selected
from faults.run import Case, Line, prepare, quiet, run

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "faults.md"
RESULTS, BEFORE = DOCS / "faults" / "results.jsonl", DOCS / "faults" / "before.jsonl"


def work(cases: list[Case]) -> list[Line]:
    """Return the results of some runs; called in a worker process."""
    torch.set_num_threads(1)
    return [{**run(case), **baselines(case)} for case in cases]


def baselines(case: Case) -> Line:
    """Return the steps at which other detectors raise; they only look for values that are not finite."""
    if case.fault is None or "nonfinite" not in load_faults()[case.fault].causes:
        return {}
    with quiet():
        return {"anomaly": anomaly_step(prepare(case)), "underflow": overflow_step(prepare(case))}


def packed(line: Line) -> Line:
    """Return a line without empty values and without what its key implies, to keep the file small."""
    implied = ("architecture", "split", "variant", "seed", "fault")
    return {name: value for name, value in line.items() if name not in implied and value not in (None, [])}


def unpacked(line: Line) -> Line:
    """Return the line that `packed` was given."""
    architecture, variant, seed, fault = line["key"].split("/", 3)
    split = ARCHITECTURES[architecture].split
    case = {"architecture": architecture, "split": split, "variant": variant, "seed": int(seed)}
    empty = {"layers": [], "alarms": [], "nan": None, "outlier": None}
    return {**case, "fault": None if fault == "healthy" else fault, **empty, **line}


def read_results(path: Path) -> list[Line]:
    """Return the lines of a file of results; a last line that is cut off is ignored."""
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(unpacked(json.loads(text)))
        except json.JSONDecodeError:
            continue
    return lines


def results_of(groups: list[list[Case]], workers: int) -> Iterator[list[Line]]:
    """Yield the results of each group as it is done."""
    if workers == 1:
        yield from map(work, groups)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(work, group) for group in groups]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_all(cases: list[Case], path: Path, workers: int) -> None:
    """Run what is not in the file yet, and append it."""
    done = {line["key"] for line in read_results(path)}
    left = [case for case in cases if case.key not in done]
    print(f"{len(left)} of {len(cases)} runs to do, with {workers} workers.", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    start, count = time.monotonic(), 0
    with open(path, "a", encoding="utf-8") as file:
        for lines in results_of(grouped(left), workers):
            file.writelines(json.dumps(packed(line), ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            count += len(lines)
            minutes = (time.monotonic() - start) / 60
            print(
                f"{count}/{len(left)} runs, {minutes:.1f} of about {minutes * len(left) / count:.0f} minutes",
                flush=True,
            )


def write_page(results: Path = RESULTS) -> None:
    """Write docs/faults.md from the results."""
    PAGE.write_text(text_of(read_results(results), read_results(BEFORE)), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the board from the command line."""
    parser = argparse.ArgumentParser(prog="faults.board", description="Measure the monitor on faulty and healthy runs.")
    parser.add_argument("--workers", type=int, default=2, help="Number of single-threaded processes.")
    parser.add_argument("--limit", type=int, help="Number of faulty runs, spread evenly over the faults.")
    parser.add_argument("--split", choices=sorted(SEEDS), help="Only this half of the architectures and seeds.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="The file of results, which is continued.")
    parser.add_argument("--page", action="store_true", help="Only write the page from the results.")
    parser.add_argument("--no-page", action="store_true", help="Do not write the page.")
    chosen = parser.parse_args(arguments)
    try:
        if not chosen.page:
            run_all(selected(chosen.split, chosen.limit), chosen.results, chosen.workers)
    except KeyboardInterrupt:
        print("Interrupted. Start it again to continue.", file=sys.stderr)
        return 130
    if not chosen.no_page:
        write_page(chosen.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
