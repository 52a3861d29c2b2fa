"""A comparison as tables for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from omninorm.cli.harmless import harmless
from omninorm.experiments.compare.plan import ComparePlan
from omninorm.experiments.compare.results import RESULTS_FILE, TABLE_FILE, TIMINGS_FILE


def introduce(screen: Console, plan: ComparePlan, runs: int) -> None:
    """What is compared."""
    screen.print(harmless(plan.title, one_line=True))
    for study in plan.studies:
        norms, places = ", ".join(study.normalization), ", ".join(study.placement)
        depths = ", ".join(map(str, study.depth))
        rates = "" if study.protocol in ("init", "speed") else f"; rates {', '.join(f'{rate:g}' for rate in study.lr)}"
        vary = "".join(f"; {name} {values}" for name, values in study.vary.items())
        screen.print(
            f"  {study.name}, {study.protocol}: {norms} × {places}; blocks {depths}{rates}{vary}; {study.seeds} seeds"
        )
    screen.print(f"{runs} runs in all, in processes of one thread.")


def conclude(screen: Console, results: Mapping[str, Any]) -> None:
    """Every study as a table, and what failed."""
    for study in results["studies"]:
        screen.print(_table(study))
    if results["failures"]:
        screen.print(f"{len(results['failures'])} runs failed and are missing above:")
        for name, why in results["failures"].items():
            screen.print(f"  {name}: {harmless(why, one_line=True)}")


def where(screen: Console, folder: Path, page: Path) -> None:
    """What was written."""
    screen.print(f"\nPage     {page}")
    for title, name in (("Results", RESULTS_FILE), ("Table  ", TABLE_FILE), ("Timings", TIMINGS_FILE)):
        screen.print(f"{title}  {folder / name}")


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(42.0), duration(170.0)
        ('42 s', '3 minutes')
    """
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _table(study: Mapping[str, Any]) -> Table:
    judged = study["protocol"] != "init"
    better = f" ({'less' if study['lower_is_better'] else 'more'} is better)" if judged else ""
    note = (
        f"\nA difference of {study['margin']:g} matters; unclear (+n): about n more seeds would tell" if judged else ""
    )
    title = f"\n{study['name']}: {study['unit']}{better}{note}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("configuration", no_wrap=True)
    for heading in ("blocks", "mean", "lost", "difference, 95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    found = {(each["depth"], each["label"]): each for each in study["comparisons"]}
    depth = None
    for row in study["configurations"]:
        if depth not in (None, row["depth"]):
            table.add_section()
        depth = row["depth"]
        known = [value for value in row["values"].values() if value is not None]
        mean = _number(statistics.fmean(known)) if known else "–"
        lost = f"{len(row['lost'])}/{len(row['values'])}" if judged else ""
        table.add_row(row["label"], str(depth), mean, lost, *_difference(found.get((depth, row["label"]))))
    return table


def _difference(each: Mapping[str, Any] | None) -> tuple[str, str]:
    if each is None:
        return "", "baseline"
    verdict = _short(each.get("verdict", ""))
    if each["mean"] is None:
        return "–", verdict
    ends = "" if each["low"] is None else f" ({each['low']:+.3f} … {each['high']:+.3f})"
    return f"{each['mean']:+.3f}{ends}", verdict


def _short(verdict: str) -> str:
    """A verdict in the width of a column; results.json has it whole."""
    if verdict.startswith("not enough evidence"):
        return f"unclear (+{verdict.split('about ')[1].split()[0]})"
    return verdict.split(":")[0]


def _number(value: float) -> str:
    return f"{value:.4g}"
