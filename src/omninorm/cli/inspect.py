"""`omninorm inspect`: static checks of a checkpoint's weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from omninorm.cli.console import CPU_HELP, check_on_cpu, console
from omninorm.cli.harmless import harmless
from omninorm.cli.inspect_against import compare
from omninorm.config import check_count
from omninorm.errors import ConfigError

if TYPE_CHECKING:
    from omninorm.inspection import Finding, Inspection
    from omninorm.inspection.blocks import BlockStats
    from omninorm.inspection.inspect import Progress as Report

FAILED = 1
_STYLES = {"fail": "bold red", "warn": "yellow", "note": "cyan"}
_PROGRESS_FROM = 1 << 28  # bytes; smaller files need only a few seconds


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors or .gguf file, a folder with weights, or a run folder.", show_default=False
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another checkpoint of the same model: print the differences, such as gains that are higher by 1.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Maximum number of findings to show.")] = 10,
    norms: Annotated[bool, typer.Option("--norms", help="Also show a table of every norm's gains.")] = False,
    device: Annotated[str, typer.Option(help=CPU_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all measurements.")] = False,
) -> None:
    """Check a checkpoint's weights: non-finite values, gains, dead and massive weights, unusual blocks.

    With --against, compare it with another checkpoint instead, in any format: Hugging Face, GGUF, MLX or a run.

    The exit code is 1 if a finding is a failure, or if a difference matters.
    """
    check_on_cpu("inspect", device, "it reads each weight from disk once and computes little with it")
    check_count("top", top, at_least=0)
    from omninorm.inspection import inspect_checkpoint  # a late import: this module imports torch

    screen = console()
    if against is not None:
        if norms:
            raise ConfigError("--norms and --against cannot be combined", "", "inspect each checkpoint with --norms")
        compare(screen, path, against, top, as_json)
        return
    with _progress(screen) as report:
        result = inspect_checkpoint(path, report)
    if as_json:
        typer.echo(json.dumps(result.to_record(), indent=2, allow_nan=False))
    else:
        _show(screen, result, top, norms)
    if result.failed:
        raise typer.Exit(FAILED)


@contextlib.contextmanager
def _progress(screen: Console) -> Iterator[Report | None]:
    """Show a transient progress bar on a terminal. It is on stderr, so that `--json > file` shows it as well."""
    errors = Console(stderr=True, markup=False, emoji=False, highlight=False)
    if not (errors.is_terminal and screen.is_terminal):
        yield None
        return
    columns = (BarColumn(bar_width=16), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=errors, transient=True, refresh_per_second=8) as progress:
        task = progress.add_task("", visible=False)

        def report(done: int, total: int, name: str) -> None:
            visible = total >= _PROGRESS_FROM
            shown = harmless(name, one_line=True)
            progress.update(task, completed=done, total=total, description=shown, visible=visible)

        yield report


def _show(screen: Console, result: Inspection, top: int, norms: bool) -> None:
    screen.print(_line(result.verdict), style="bold")
    for finding in result.findings[:top]:
        _show_finding(screen, finding)
    count = len(result.findings)
    if count > top:
        screen.print(f"\n… and {count - top} more: pass --top {count} to show them, or --json for all measurements")
    for stack, blocks in groupby(result.blocks, key=lambda block: block.stack):
        screen.print()
        screen.print(_block_table(stack, list(blocks)))
    if norms:
        screen.print()
        screen.print(_norm_table(result))
    screen.print()
    screen.print(_line(_totals(result)))


def _show_finding(screen: Console, finding: Finding) -> None:
    where = finding.tensor or finding.layer
    others = f" and {len(finding.others)} more of the same role" if finding.others else ""
    screen.print()
    screen.print(f"{finding.severity.upper()}  {finding.rule}", style=_STYLES[finding.severity], end="")
    screen.print(f"  {_line(where)}{others}" if where else "")
    screen.print(f"      {_line(finding.evidence)}")
    screen.print(f"      → {_line(finding.remedy)}")


def _block_table(stack: str, blocks: list[BlockStats]) -> Table:
    titles = ("block", "attention out", "feed-forward out", "matrices", "max |w|", "median γ", "max |γ|")
    table = _table(f"{_line(stack)}: RMS of the weights by block", titles)
    for block in blocks:
        weights = (block.attention_out, block.feed_forward_out, block.matrices, block.max_abs)
        numbers = (*weights, block.gain_median, block.gain_max)
        table.add_row(str(block.block), *("–" if number is None else f"{number:.3g}" for number in numbers))
    return table


def _norm_table(result: Inspection) -> Table:
    table = _table("norms", ("gain", "width", "min |γ|", "median", "max |γ|", "silent"))
    table.columns[0].justify, table.columns[0].overflow = "left", "fold"
    table.columns[0].min_width = 38
    found = [tensor for tensor in result.tensors if tensor.gains is not None]
    for tensor in sorted(found, key=lambda each: -1 if each.place.block is None else each.place.block):
        gains = tensor.gains
        assert gains is not None
        sizes = (f"{size:.3g}" for size in (gains.smallest, gains.median, gains.largest))
        table.add_row(_line(tensor.name), str(gains.count), *sizes, f"{gains.silent:.1%}")
    return table


def _table(title: str, titles: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for each in titles:
        table.add_column(each, justify="right")
    return table


def _totals(result: Inspection) -> str:
    totals = result.totals()
    dtypes = ", ".join(f"{name} {count}" for name, count in totals["dtypes"].items())
    skipped = f"; {totals['not_measured']} of other types, not measured" if totals["not_measured"] else ""
    eps = f"; norm ε {totals['norm_eps']:g}" if totals["norm_eps"] is not None else ""
    return (
        f"{totals['tensors']} tensors, {totals['norms']} norms, {totals['parameters']:,} parameters,"
        f" {totals['bytes'] / 1e6:,.1f} MB"
        f" ({dtypes}){skipped}{eps}"
    )


def _line(text: str) -> str:
    return harmless(text, one_line=True)
