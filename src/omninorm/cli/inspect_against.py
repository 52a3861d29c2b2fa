"""`omninorm inspect A --against B`: prints the differences between two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from omninorm.cli.harmless import harmless

if TYPE_CHECKING:
    from omninorm.inspection import Comparison

DIFFERENT = 1


def compare(screen: Console, a: Path, b: Path, top: int, as_json: bool) -> None:
    """Print the comparison, and exit with 1 if a difference matters."""
    from omninorm.inspection import compare_weights  # a late import: this module imports torch

    result = compare_weights(a, b)
    if as_json:
        typer.echo(json.dumps(result.to_record(), indent=2, allow_nan=False))
    else:
        _show(screen, result, top)
    if result.matters:
        raise typer.Exit(DIFFERENT)


def _show(screen: Console, result: Comparison, top: int) -> None:
    screen.print(_line(result.verdict), style="bold")
    screen.print(_line(f"A: {result.a} ({result.formats[0]})"))
    screen.print(_line(f"B: {result.b} ({result.formats[1]})"))
    for each in result.differences[:top]:
        label, style = ("DIFFERS", "bold red") if each.matters else ("NOTE", "cyan")
        screen.print()
        screen.print(f"{label}  {each.kind}", style=style)
        screen.print(f"      {_line(each.sentence)}")
    count = len(result.differences)
    if count > top:
        screen.print(f"\n… and {count - top} more: pass --top {count} to show them, or --json for all measurements")
    _show_errors(screen, result)
    screen.print()
    ways = "; ".join(f"{way}: {count}" for way, count in result.matched().items())
    screen.print(_line(f"Matching of the {len(result.results)} pairs: {ways}."))
    for skipped in result.not_compared:
        times = f"{skipped.count} × " if skipped.count > 1 else ""
        screen.print(_line(f"Not compared in {skipped.where}: {times}{skipped.role}, because {skipped.reason}."))


def _show_errors(screen: Console, result: Comparison) -> None:
    rows = result.errors()
    if not rows:
        return
    table = Table(title="relative error of rounding or quantization", title_justify="left", box=None, pad_edge=False)
    for title in ("tensors", "count", "A", "B", "median", "largest", "in"):
        table.add_column(title, justify="left" if title in ("tensors", "in") else "right", overflow="fold")
    for row in rows:
        errors = (f"{row[name]:.2g}" for name in ("median", "largest"))
        table.add_row(_line(row["role"]), str(row["tensors"]), *row["dtypes"], *errors, _line(row["largest_in"]))
    screen.print()
    screen.print(table)


def _line(text: str) -> str:
    return harmless(text, one_line=True)
