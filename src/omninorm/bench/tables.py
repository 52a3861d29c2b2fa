"""Prints benchmark results as tables and lines to a terminal. This module only reads results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from omninorm.bench.targets import FAIL, UNKNOWN

# Tables fit 80 columns; on narrower terminals, names are cut, but not numbers.
_NUMBER_WIDTH = 6
_Key = tuple[str, str, int, str]


def show(screen: Console, result: Mapping[str, Any]) -> None:
    """Print a result."""
    screen.print(speed_table(result))
    for line in (*norm_share_lines(result), *loss_lines(result), *skipped_lines(result)):
        screen.print(line)
    screen.print(target_table(result))
    for line in missed_lines(result):
        screen.print(line)


def target_table(result: Mapping[str, Any]) -> Table:
    """Return a table of all targets: worst size, median over the sizes, verdict, and number of sizes that meet it."""
    title = "\nTargets: our time / the other's (speed: the inverse); the worst size decides"
    table = _table(title, ("target",), ("limit", "worst", "median"))
    table.add_column("verdict", no_wrap=True, min_width=len(UNKNOWN))
    for each in result["targets"]:
        worst, median = (_number(each[name]) for name in ("worst", "median"))
        met = f" {each['sizes'] - len(each['missed'])}/{each['sizes']}" if each["sizes"] else ""
        table.add_row(each["name"], each["wanted"], worst, median, each["verdict"] + met)
    return table


def speed_table(result: Mapping[str, Any]) -> Table:
    """Return a table of all jobs: each contestant's GB/s, and our time over its, as median and worst of the sizes."""
    table = _table(
        "\nSpeed: GB/s, and our time / the other's (below 1: omninorm is faster)", ("job",), ("GB/s", "ratio", "worst")
    )
    for key, group in _by_job(result["measurements"]).items():
        table.add_section()
        table.add_row(_job(key))
        for name in _names(group):
            table.add_row(f"  {name}", *_speed(group, name))
    return table


def norm_share_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the norms' share of a Thinker's training step."""
    for each in result["measurements"]:
        if "norm_share" in each:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in each["norm_share"].items())
            threads = f"{each['threads']} thread{'s' if each['threads'] > 1 else ''}"
            yield f"Norms' share of a {each['case']} in {each['dtype']}, {threads}: {shares}"


def loss_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sizes at which another implementation is faster, one line per job and implementation."""
    losses: dict[tuple[_Key, str], list[str]] = {}
    for each in result["losses"]:
        size = f"{each['rows']}×{each['width']} ({each['ratio']:.2f})"
        losses.setdefault((_key(each), each["against"]), []).append(size)
    head = "\nOther implementations that were faster (our time / theirs):"
    yield head if losses else "\nNo other implementation was faster at any size."
    for (key, against), sizes in losses.items():
        yield f"  {_job(key)}, against {against}: {', '.join(sizes)}"


def skipped_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the skipped measurements, one line per reason."""
    reasons: dict[str, list[str]] = {}
    for each in result["skipped"]:
        reasons.setdefault(each["why"], []).append(each["what"])
    for why, what in reasons.items():
        more = f" and {len(what) - 1} more" if len(what) > 1 else ""
        yield f"Skipped {what[0]}{more}: {why}"


def missed_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sizes at which a limit was missed, and the number of each verdict."""
    for each in result["targets"]:
        if each["verdict"] == FAIL:
            yield f"Missed {each['name']} {each['wanted']} at {'; '.join(each['missed'])}"
    verdicts = [each["verdict"] for each in result["targets"]]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    yield f"{len(verdicts)} targets: {counts}. Every ratio is the median of ratios within a round."


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True, min_width=_NUMBER_WIDTH)
    return table


def _key(each: Mapping[str, Any]) -> _Key:
    return each["case"], each["dtype"], each["threads"], each["allocator"]


def _job(key: _Key) -> str:
    case, dtype, threads, allocator = key
    return f"{case}, {dtype}, {threads}t" + (", default malloc" if allocator == "default" else "")


def _by_job(measurements: Sequence[Mapping[str, Any]]) -> dict[_Key, list[Mapping[str, Any]]]:
    groups: dict[_Key, list[Mapping[str, Any]]] = {}
    for each in measurements:
        groups.setdefault(_key(each), []).append(each)
    return groups


def _names(group: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in group for name in each["contestants"]))


def _speed(group: Sequence[Mapping[str, Any]], name: str) -> tuple[str, str, str]:
    present = [each for each in group if name in each["contestants"]]
    rates = [rate for each in present if (rate := each["contestants"][name]["gb_per_s"]) is not None]
    ratios = [each["ratios"][name]["median"] for each in present if name in each["ratios"]]
    rate = f"{statistics.median(rates):.1f}" if rates else ""
    return rate, _number(statistics.median(ratios), "") if ratios else "", _number(max(ratios)) if ratios else ""


def _number(value: float | None, otherwise: str = "–") -> str:
    return otherwise if value is None else f"{value:.2f}"
