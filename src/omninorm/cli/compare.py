"""`omninorm compare`: a grid of norms, placements, depths, rates and seeds, with paired statistics."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from omninorm.cli.console import console, program
from omninorm.config import check_count, check_number
from omninorm.errors import ConfigError
from omninorm.experiments.corpus import load_corpus
from omninorm.experiments.interrupt import Interrupt
from omninorm.experiments.run_folder import fresh_folder, locked

_DEFAULT = "quick"
_SECONDS_BETWEEN_LINES = 15.0


def compare(
    plan: Annotated[Path | None, typer.Argument(help="A plan: YAML, TOML or JSON.", show_default="a preset")] = None,
    preset: Annotated[
        str | None, typer.Option(help="quick (two minutes) or placements (all of them).", show_default=_DEFAULT)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The comparison's folder, new or empty.", show_default="runs/compare-N")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the comparison in this folder.")] = None,
    text: Annotated[
        str | None, typer.Option(help="A text file, or a folder of them.", show_default="King James Bible")
    ] = None,
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
    # Not at the start of this file: they need packages that the other commands do without.
    from omninorm.bench.config import all_threads
    from omninorm.cli import compare_tables as tables
    from omninorm.experiments.compare.engine import Engine
    from omninorm.experiments.compare.estimate import estimate_seconds, longest_first
    from omninorm.experiments.compare.plan import read_plan
    from omninorm.experiments.compare.presets import preset as named
    from omninorm.experiments.compare.results import collect, write
    from omninorm.experiments.compare.store import Store, to_json

    count = all_threads() if workers is None else workers
    check_count("workers", count)
    check_number("time_limit", time_limit, above=0.0)
    screen = Console(file=sys.stderr, soft_wrap=True, markup=False) if as_json else console()
    if resume is not None:
        if plan or preset or text or out:
            raise ConfigError("--resume goes on with the comparison's own plan", "another one", "leave it out")
        store, chosen = Store.open(resume)
    else:
        if plan and preset:
            raise ConfigError("a comparison has one plan", f"{plan} and --preset {preset}", "leave one out")
        chosen = read_plan(plan) if plan else named(preset or _DEFAULT)
        chosen = chosen.model_copy(update={"text": text}) if text else chosen
        store = Store(out or fresh_folder("compare"))
    cells = chosen.cells()
    corpus = load_corpus(chosen.text)
    tables.introduce(screen, chosen, len(cells), count)
    todo = longest_first(cell for name, cell in cells.items() if name not in store.done())
    seconds = estimate_seconds(todo, count)
    screen.print(f"{len(todo)} runs to do, about {tables.duration(seconds)} with {count} at a time.")
    if dry_run:
        return
    store = store if resume is not None else Store.create(store.path, chosen)
    screen.print(f"Everything is written to {store.path}\n")
    with locked(store.path), Interrupt() as interrupt, _Progress(screen, len(todo)) as progress:
        store.clean()
        Engine(store, count, time_limit).run(
            todo, lambda running, done, failed: progress.look(running, done, failed) and interrupt.signal is None
        )
    if interrupt.signal is not None:
        screen.print(f"Stopped. Go on with:\n  {program()} compare --resume {quote(str(store.path))}")
        raise typer.Exit(128 + interrupt.signal)
    results = collect(chosen, store, corpus)
    write(chosen, store, results)
    if as_json:
        typer.echo(to_json(results).decode(), nl=False)
    tables.conclude(screen, results)
    tables.where(screen, store.path)


class _Progress:
    """A bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, screen: Console, total: int) -> None:
        self._screen, self._total = screen, total
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=screen)
        self._task = self._bar.add_task("starting", total=total)
        self._last = time.monotonic()

    def __enter__(self) -> _Progress:
        if self._screen.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._screen.is_terminal:
            self._bar.stop()

    def look(self, running: dict[str, float], done: int, failed: int) -> bool:
        """Shows what runs. Always true."""
        what = ", ".join(f"{name.rsplit('-', 1)[0]} {seconds:.0f} s" for name, seconds in running.items())
        lost = f", {failed} failed" if failed else ""
        self._bar.update(self._task, completed=done + failed, description=what + lost)
        if not self._screen.is_terminal and time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._screen.print(f"{done + failed}/{self._total}{lost} {what}")
            self._screen.file.flush()
        return True
