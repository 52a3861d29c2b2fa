"""Prints a comparison's plan and results to a terminal."""

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
from omninorm.report.comparison.wording import count_outcomes
from omninorm.report.text import plural


def introduce(screen: Console, plan: ComparePlan, runs: int) -> None:
    """Print the plan."""
    screen.print(harmless(plan.title, one_line=True))
    for study in plan.studies:
        norms, places = ", ".join(study.normalization), ", ".join(study.placement)
        depths = ", ".join(map(str, study.depth))
        rates = (
            ""
            if study.protocol in ("init", "speed")
            else f"; learning rates {', '.join(f'{rate:g}' for rate in study.lr)}"
        )
        vary = "".join(f"; {name} {values}" for name, values in study.vary.items())
        screen.print(
            f"  {study.name}, {study.protocol}: {norms} × {places}; blocks {depths}{rates}{vary}; "
            f"{plural(study.seeds, 'seed')}"
        )
    screen.print(f"{plural(runs, 'run')} in total, each in a process of one thread.")


def conclude(screen: Console, results: Mapping[str, Any]) -> None:
    """Print a table for every study, and the number of failed runs."""
    for study in results["studies"]:
        screen.print(_table(study))
    if results["failures"]:
        count = len(results["failures"])
        verb = "is" if count == 1 else "are"
        screen.print(f"{plural(count, 'run')} failed and {verb} missing above. --resume repeats failed runs.")
        for name, why in results["failures"].items():
            screen.print(f"  {name}: {harmless(why, one_line=True)}")


def where(screen: Console, folder: Path, page: Path) -> None:
    """Print the paths of the results."""
    screen.print(f"\nPage     {page}")
    for title, name in (("Results", RESULTS_FILE), ("Table  ", TABLE_FILE), ("Timings", TIMINGS_FILE)):
        screen.print(f"{title}  {folder / name}")


def duration(seconds: float) -> str:
    """Return a duration in words.

    Example:
        >>> duration(0.2), duration(42.0), duration(70.0), duration(170.0), duration(9000.0)
        ('1 second', '42 seconds', '1 minute', '3 minutes', '2.5 hours')
    """
    if seconds < 60:
        return plural(max(1, round(seconds)), "second")
    return plural(round(seconds / 60), "minute") if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _table(study: Mapping[str, Any]) -> Table:
    judged = study["protocol"] != "init"
    better = f" ({'lower' if study['lower_is_better'] else 'higher'} is better, margin {study['margin']:g})"
    title = f"\n{study['name']}: {study['unit']}{better if judged else ''}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("configuration", no_wrap=True)
    for heading in ("blocks", "mean"):
        table.add_column(heading, justify="right", no_wrap=True)
    if judged:
        table.add_column("runs", min_width=9)
    table.add_column("difference\n(95 % interval)", justify="right", min_width=16)
    table.add_column("verdict", min_width=20)
    found = {(each["depth"], each["label"]): each for each in study["comparisons"]}
    depth = None
    for row in study["configurations"]:
        if depth not in (None, row["depth"]):
            table.add_section()
        depth = row["depth"]
        known = [value for value in row["values"].values() if value is not None]
        mean = _number(statistics.fmean(known)) if known else "–"
        runs = count_outcomes(row.get("outcomes", {}), row["lost"], len(row["values"]), row["missing"])
        compared = _difference(found.get((depth, row["label"])))
        table.add_row(row["label"], str(depth), mean, *([runs] if judged else []), *compared)
    return table


def _difference(each: Mapping[str, Any] | None) -> tuple[str, str]:
    if each is None:
        return "", "baseline"
    verdict = each.get("verdict", "")
    if each["mean"] is None:
        return "–", verdict
    ends = "" if each["low"] is None else f"\n({each['low']:+.3f} … {each['high']:+.3f})"
    return f"{each['mean']:+.3f}{ends}", verdict


def _number(value: float) -> str:
    return f"{value:.4g}"
