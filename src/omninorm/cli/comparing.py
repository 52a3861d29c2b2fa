"""A comparison on the command line: its plan, its runs and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import torch
import typer
from rich.console import Console

from omninorm.cli import compare_tables as tables
from omninorm.cli.compare_cards import show_cards
from omninorm.cli.console import program
from omninorm.cli.counting import Counting
from omninorm.cli.harmless import harmless
from omninorm.cli.training import REPORT_FILE
from omninorm.errors import ConfigError
from omninorm.experiments.compare import Cell, ComparePlan, read_plan
from omninorm.experiments.compare import preset as named_plan
from omninorm.experiments.compare.apart import probe_in_subprocess
from omninorm.experiments.compare.engine import Engine, Runner
from omninorm.experiments.compare.estimate import estimate_seconds, longest_first
from omninorm.experiments.compare.factory import check_factory_name
from omninorm.experiments.compare.plan import check_memory, fits_memory
from omninorm.experiments.compare.protocols.common import check_text
from omninorm.experiments.compare.results import collect, collect_timings, write
from omninorm.experiments.compare.store import Store, to_json
from omninorm.experiments.corpus import Corpus, load_corpus
from omninorm.experiments.interrupt import Interrupt
from omninorm.experiments.run_folder import fresh_folder, locked
from omninorm.report.comparison import read_comparison, write_comparison_page
from omninorm.report.text import plural


@dataclass(frozen=True)
class Crew:
    """The workers of a comparison, and their devices.

    Args:
        engine: "local" or "ray".
        workers: the number of parallel runs.
        time_limit: seconds per run.
        device: the device as the user typed it.
        devices: the devices of this machine that the workers share.
    """

    engine: str
    workers: int
    time_limit: float
    device: str
    devices: Sequence[torch.device]

    def where(self) -> str:
        """Return the GPUs as the end of a phrase, such as " on cuda:0 …"; empty for the CPU."""
        if self.devices[0].type == "cpu":
            return ""
        return f" on {', '.join(map(str, self.devices))} (not yet measured on a GPU)"


@dataclass(frozen=True)
class Job:
    """A comparison that is about to run. `is_new` is true if its folder has not been created yet."""

    plan: ComparePlan
    store: Store
    corpus: Corpus
    is_new: bool

    def introduce(self, screen: Console, crew: Crew) -> list[Cell]:
        """Print the plan and the estimated duration; return the runs that are not done yet.

        Raises:
            ConfigError: the model's factory ignores its arguments, or a run is too large for this machine, which would
                have to compute it.
        """
        cells = self.plan.cells()
        tables.introduce(screen, self.plan, len(cells))
        done = set() if self.is_new else self.store.done()
        damaged = [] if self.is_new else self.store.damaged(cells.values())
        done -= {each.cell for each in damaged if each.costs_run}
        for each in damaged:
            repeated = "" if each.cell in done else " and the run repeated"
            screen.print(f"{harmless(each.fault, one_line=True)}. The file will be set aside{repeated}.")
        todo = longest_first(cell for name, cell in cells.items() if name not in done)
        if crew.engine == "local":
            for cell in todo:
                check_memory(cell)
        screen.print(self._workload(todo, crew))
        return todo

    def _workload(self, todo: Sequence[Cell], crew: Crew) -> str:
        """Return the number of runs and their estimated duration as a sentence."""
        model = self.plan.model
        if not todo:
            return "All runs are done."
        if not all(map(fits_memory, todo)):  # such a run can't be timed here, but Ray's machines may have more memory
            seconds = None
        elif model:
            seconds = probe_in_subprocess(model, todo, crew.workers, crew.time_limit, crew.devices[0])
        else:
            seconds = estimate_seconds(todo, crew.workers, crew.devices[0])
        runs, workers = plural(len(todo), "run"), f"{plural(crew.workers, 'worker')}{crew.where()}"
        if seconds is None:
            return f"{runs}, {workers}; duration unknown."
        return f"{runs}, about {tables.duration(seconds)} with {workers}."

    def run(self, screen: Console, todo: Sequence[Cell], crew: Crew) -> None:
        """Run the cells.

        Raises:
            Exit: Ctrl-C or SIGTERM stopped it; the command that resumes it has been printed.
        """
        if self.is_new:
            Store.create(self.store.path, self.plan)
        screen.print(f"Output folder: {self.store.path}\n")
        with locked(self.store.path), Interrupt() as interrupt, Counting(screen) as progress:
            self.store.clean()
            self.store.set_aside(self.plan.cells().values())

            def look(running: dict[str, float], done: int, failed: int) -> bool:
                progress(_status(running, failed), done + failed, len(todo))
                return interrupt.signal is None

            _engine(crew, self.store).run(todo, look)
        if interrupt.signal is not None:
            screen.print(f"Stopped. Resume with:\n  {program()} compare --resume {quote(str(self.store.path))}")
            raise typer.Exit(128 + interrupt.signal)

    def conclude(self, screen: Console, as_json: bool) -> None:
        """Write and print the results."""
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


def _engine(crew: Crew, store: Store) -> Runner:
    if crew.engine == "local":
        return Engine(store, crew.workers, crew.time_limit, crew.devices)
    from omninorm.experiments.compare.on_ray import RayEngine  # a late import: it needs Ray

    return RayEngine(store, crew.workers, crew.time_limit, crew.device)


def begin(path: Path | None, preset: str | None, text: str | None, model: str | None, out: Path | None) -> Job:
    """Prepare a new comparison from a file or a preset.

    Raises:
        ConfigError: both are given, or the plan is invalid.
        DataError: the text can't be used.
    """
    if path is not None and preset is not None:
        raise ConfigError("A comparison has one plan", f"{path} and --preset {preset}", "leave one of them out")
    plan = read_plan(path) if path is not None else named_plan(preset or "")
    corpus = load_corpus(text or plan.text)
    if text or plan.text:
        plan = plan.model_copy(update={"text": corpus.source})
    check_text(plan.cells().values(), corpus)
    factory = model or plan.model
    if factory:
        check_factory_name(factory)
        plan = plan.model_copy(update={"model": factory})
    return Job(plan, Store(out or fresh_folder("compare")), corpus, is_new=True)


def resume_job(folder: Path, others: Mapping[str, object]) -> Job:
    """Open an earlier comparison.

    Args:
        folder: the comparison's folder.
        others: the values of the options that can't be combined with --resume.

    Raises:
        ConfigError: one of the other options is given.
        RunError: the folder has no comparison.
    """
    given = [f"{name} {value}" for name, value in others.items() if value]
    if given:
        remedy = "leave these out, or start a new comparison without --resume"
        raise ConfigError("--resume continues a comparison with its own plan", ", ".join(given), remedy)
    store, plan = Store.open(folder)
    return Job(plan, store, load_corpus(plan.text), is_new=False)


def _status(running: dict[str, float], failed: int) -> str:
    """Return the current runs and the number of failures."""
    what = ", ".join(f"{name.rsplit('-', 1)[0]} {seconds:.0f} s" for name, seconds in running.items())
    return f"{failed} failed, {what}" if failed else what
