"""`omninorm compare`: a grid of norms, placements, depths, rates and seeds, with paired statistics."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from omninorm.bench.config import all_threads
from omninorm.cli.console import console
from omninorm.config import check_choice, check_count, check_number

_DEFAULT = "quick"


def compare(
    plan: Annotated[Path | None, typer.Argument(help="A plan: YAML, TOML or JSON.", show_default="a preset")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="quick, chapter (C1 to C7 and more), placements, or one claim such as C3.", show_default=_DEFAULT
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The comparison's folder, new or empty.", show_default="runs/compare-N")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the comparison in this folder.")] = None,
    text: Annotated[
        str | None, typer.Option(help="A text file, or a folder of them.", show_default="King James Bible")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Your own: package.module:build, from (norm, depth, vocab_size).", show_default="Thinker"),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: on the cluster that RAY_ADDRESS names, else on this machine.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Runs at the same time, one thread each.", show_default="cores")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that one run may take.")] = 1800.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its time, and run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The results as JSON on stdout, all else on stderr.")] = False,
) -> None:
    """Compare norms and placements at your depth, on your text, with intervals and verdicts.

    Ctrl-C stops; finished runs are kept and not repeated by --resume. Runs that fail are tried twice and reported.
    """
    from omninorm.cli import comparing  # it needs packages that the other commands do without

    count = all_threads() if workers is None else workers
    check_count("workers", count)
    check_number("time_limit", time_limit, above=0.0)
    check_choice("engine", engine, ("local", "ray"))
    screen = Console(file=sys.stderr, soft_wrap=True, markup=False) if as_json else console()
    if resume is None:
        job = comparing.begin(plan, preset or (None if plan else _DEFAULT), text, model, out)
    else:
        job = comparing.go_on(resume, others=(plan, preset, text, model, out))
    todo = job.introduce(screen, count, time_limit)
    if not dry_run:
        job.run(screen, todo, engine, count, time_limit)
        job.conclude(screen, as_json)
