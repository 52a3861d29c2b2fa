"""A comparison on the command line: its plan, its runs, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import typer
from rich.console import Console

from omninorm.cli import compare_tables as tables
from omninorm.cli.compare_cards import show_cards
from omninorm.cli.console import program
from omninorm.cli.counting import Counting
from omninorm.cli.train import REPORT_FILE
from omninorm.errors import ConfigError
from omninorm.experiments.compare import Cell, ComparePlan, read_plan
from omninorm.experiments.compare import preset as named_plan
from omninorm.experiments.compare.apart import look_apart
from omninorm.experiments.compare.engine import Engine, Runner
from omninorm.experiments.compare.estimate import estimate_seconds, longest_first
from omninorm.experiments.compare.protocols.common import check_text
from omninorm.experiments.compare.results import collect, collect_timings, write
from omninorm.experiments.compare.store import Store, to_json
from omninorm.experiments.corpus import Corpus, load_corpus
from omninorm.experiments.interrupt import Interrupt
from omninorm.experiments.run_folder import fresh_folder, locked
from omninorm.report.comparison import read_comparison, write_comparison_page


@dataclass(frozen=True)
class Job:
    """A comparison that is about to run. is_new: its folder is not made yet."""

    plan: ComparePlan
    store: Store
    corpus: Corpus
    is_new: bool

    def introduce(self, screen: Console, workers: int, time_limit: float) -> list[Cell]:
        """Shows what will be done and how long it takes; returns what is left to do.

        Raises:
            ConfigError: the model's factory ignores what it is told.
        """
        cells = self.plan.cells()
        tables.introduce(screen, self.plan, len(cells))
        done = set() if self.is_new else self.store.done()
        todo = longest_first(cell for name, cell in cells.items() if name not in done)
        model = self.plan.model
        seconds = look_apart(model, todo, workers, time_limit) if model and todo else estimate_seconds(todo, workers)
        about = "for how long is not known" if seconds is None else f"about {tables.duration(seconds)}"
        screen.print(f"{len(todo)} runs to do, {about} with {workers} at a time.")
        return todo

    def run(self, screen: Console, todo: Sequence[Cell], engine: str, workers: int, time_limit: float) -> None:
        """Runs the cells by the engine "local" or "ray".

        Raises:
            Exit: Ctrl-C or SIGTERM stopped it; how to go on has been printed.
        """
        if self.is_new:
            Store.create(self.store.path, self.plan)
        screen.print(f"Everything is written to {self.store.path}\n")
        with locked(self.store.path), Interrupt() as interrupt, Counting(screen) as progress:
            self.store.clean()

            def look(running: dict[str, float], done: int, failed: int) -> bool:
                progress(_told(running, failed), done + failed, len(todo))
                return interrupt.signal is None

            _engine(engine, self.store, workers, time_limit).run(todo, look)
        if interrupt.signal is not None:
            screen.print(f"Stopped. Go on with:\n  {program()} compare --resume {quote(str(self.store.path))}")
            raise typer.Exit(128 + interrupt.signal)

    def conclude(self, screen: Console, as_json: bool) -> None:
        """Writes and shows the results."""
        results = collect(self.plan, self.store, self.corpus)
        timings = collect_timings(self.plan, self.store)
        write(self.store, results, timings)
        if as_json:
            typer.echo(to_json(results).decode(), nl=False)
        tables.conclude(screen, results)
        comparison = read_comparison(self.store.path)
        show_cards(screen, [card.model_dump() for card in comparison.claims])
        page = write_comparison_page(comparison, self.store.path / REPORT_FILE)
        tables.where(screen, self.store.path, page)


def _engine(name: str, store: Store, workers: int, time_limit: float) -> Runner:
    if name == "local":
        return Engine(store, workers, time_limit)
    from omninorm.experiments.compare.on_ray import RayEngine  # it needs Ray

    return RayEngine(store, workers, time_limit)


def begin(path: Path | None, preset: str | None, text: str | None, model: str | None, out: Path | None) -> Job:
    """A new comparison, from a file or a preset.

    Raises:
        ConfigError: both are given, or the plan is bad.
        DataError: the text can't be used.
    """
    if path is not None and preset is not None:
        raise ConfigError("a comparison has one plan", f"{path} and --preset {preset}", "leave one out")
    plan = read_plan(path) if path is not None else named_plan(preset or "")
    corpus = load_corpus(text or plan.text)
    if text or plan.text:
        plan = plan.model_copy(update={"text": corpus.source})
    check_text(plan.cells().values(), corpus)
    if model or plan.model:
        plan = plan.model_copy(update={"model": model or plan.model})
    return Job(plan, Store(out or fresh_folder("compare")), corpus, is_new=True)


def go_on(folder: Path, others: Sequence[object]) -> Job:
    """An earlier comparison.

    Raises:
        ConfigError: something else is given, too.
        RunError: there is no comparison in the folder.
    """
    if any(others):
        raise ConfigError("--resume goes on with the comparison's own plan", "another one", "leave it out")
    store, plan = Store.open(folder)
    return Job(plan, store, load_corpus(plan.text), is_new=False)


def _told(running: dict[str, float], failed: int) -> str:
    """What runs now."""
    what = ", ".join(f"{name.rsplit('-', 1)[0]} {seconds:.0f} s" for name, seconds in running.items())
    return f"{failed} failed, {what}" if failed else what
