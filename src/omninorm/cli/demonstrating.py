"""The demo on the command line: its runs, their progress, and its results."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from omninorm.cli.console import console, generate_command, program
from omninorm.cli.demo import DEPTH, STEPS
from omninorm.cli.harmless import harmless
from omninorm.cli.training import REPORT_FILE
from omninorm.config import check_count
from omninorm.device import AUTO, find_devices
from omninorm.errors import ConfigError, RunError
from omninorm.experiments import demo as library
from omninorm.experiments.corpus import load_corpus
from omninorm.experiments.demo_figure import draw, load_matplotlib
from omninorm.experiments.interrupt import Interrupt
from omninorm.experiments.run_folder import fresh_folder
from omninorm.experiments.runs import Plan, load_run, read_plan
from omninorm.experiments.sample import stream_text
from omninorm.experiments.workers import Workers
from omninorm.record import RECORD_FILE, final_status, read_record
from omninorm.report import judge, read_run, write_page

_LABELS = {name: label for name, (label, _) in library.VARIANTS.items()}
_SECONDS_BETWEEN_UPDATES = 0.5
_SECONDS_BETWEEN_LINES = 15.0


def run(
    out: Path | None,
    resume: Path | None,
    depth: int | None,
    steps: int | None,
    text: str | None,
    device: str | None,
    workers: int,
) -> None:
    """Run the demo, new or resumed, and print its results.

    Args:
        out: the new folder; None means a new folder runs/demo-N.
        resume: the folder of an interrupted demo, which continues with its own settings; None starts a new demo.
        depth, steps: the number of blocks and of optimizer steps; None means the defaults.
        text: a file or a folder; None means the default text.
        device: the name of the device or, for all GPUs, of their type; None means the device of the runs.
        workers: the number of parallel single-threaded workers.

    Raises:
        ConfigError, DataError, RunError: an option, the text or a folder cannot be used.
        Exit: Ctrl-C or SIGTERM stopped it; the command that resumes it has been printed.
    """
    check_count("workers", workers)
    load_matplotlib()  # fail now rather than after the training
    torch.set_num_threads(1)
    screen = console()
    devices = find_devices(device or AUTO)
    folder, plans = _plans(out, resume, depth, steps, text)
    library.prepare(folder, plans, str(devices[0]))
    _introduce(screen, folder, plans, workers)
    _train(screen, folder, plans, workers, [] if resume is not None and device is None else devices)
    screen.print("Computing the baselines")
    outcomes, baselines = _judge(folder, plans)
    _conclude(screen, folder, outcomes, baselines)


def _plans(
    out: Path | None, resume: Path | None, depth: int | None, steps: int | None, text: str | None
) -> tuple[Path, Mapping[str, Plan]]:
    if resume is None:
        folder = out or fresh_folder("demo")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            remedy = f"choose another folder, or resume with {program()} demo --resume {quote(str(folder))}"
            raise RunError("--out must be a new or empty folder", f"{folder}", remedy)
        return folder, library.demo_plans(DEPTH if depth is None else depth, STEPS if steps is None else steps, text)
    given = {"--out": out, "--depth": depth, "--steps": steps, "--text": text}
    changed = [f"{name} {value}" for name, value in given.items() if value is not None]
    if changed:
        remedy = "omit them, or start a new demo without --resume"
        raise ConfigError("--resume uses the original settings of the demo", ", ".join(changed), remedy)
    if not resume.exists():
        raise RunError(f"No such file or folder: {resume}", "", "pass a folder that omninorm demo wrote")
    first = read_plan(resume / next(iter(library.VARIANTS)))
    return resume, library.demo_plans(first.model.n_layers, first.train.steps, first.text, first.train.seed)


def _introduce(screen: Console, folder: Path, plans: Mapping[str, Plan], count: int) -> None:
    model, train = next(iter(plans.values())).model, next(iter(plans.values())).train
    tokens = train.steps * train.tokens_per_step
    screen.print(
        f"Training one transformer ({model.n_layers} blocks, width {model.d_model}) {len(plans)} times. Seed, text, "
        f"learning rate ({train.lr:g}) and length ({train.steps} steps, {tokens:,} bytes) are the same; only the "
        "norms differ."
    )
    screen.print(f"Parallel workers: {min(count, len(plans))}, one thread each\nOutput folder: {folder}\n")


def _train(
    screen: Console, folder: Path, plans: Mapping[str, Plan], count: int, devices: Sequence[torch.device]
) -> None:
    waiting = [folder / name for name in plans if final_status(folder / name / RECORD_FILE) is None]
    with Interrupt() as interrupt, _Progress(screen, plans) as progress, Workers(waiting, count, devices) as workers:
        while workers.advance() and interrupt.signal is None:
            time.sleep(_SECONDS_BETWEEN_UPDATES)
            progress.update(folder)
    progress.update(folder)
    if interrupt.signal is not None:
        screen.print(f"Stopped. Resume with:\n  {program()} demo --resume {quote(str(folder))}")
        raise typer.Exit(128 + interrupt.signal)


class _Progress:
    """Progress of the runs, read from their records: bars on a terminal, a line every 15 seconds elsewhere."""

    def __init__(self, screen: Console, plans: Mapping[str, Plan]) -> None:
        self._screen = screen
        columns = (TextColumn("{task.fields[label]:<24}"), BarColumn(bar_width=20), MofNCompleteColumn())
        self._bars = Progress(*columns, TextColumn("{task.description}"), TimeElapsedColumn(), console=screen)
        self._tasks = {
            name: self._bars.add_task("waiting", total=plan.train.steps, start=False, label=_LABELS[name])
            for name, plan in plans.items()
        }
        self._sizes: dict[str, int] = {}
        self._reported: set[str] = set()  # the runs whose end has been printed
        self._last = time.monotonic()

    def __enter__(self) -> _Progress:
        if self._screen.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._screen.is_terminal:
            self._bars.stop()

    def update(self, folder: Path) -> None:
        """Read the records that have grown, and display their progress."""
        for name in self._tasks:
            record = folder / name / RECORD_FILE
            size = record.stat().st_size if record.exists() else 0
            if size != self._sizes.get(name):
                self._sizes[name] = size
                self._show(name, read_record(record))
        if not self._screen.is_terminal and time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            running = [self._line(name) for name in self._tasks if name not in self._reported]
            self._screen.print("; ".join(running))
            self._screen.file.flush()

    def _show(self, name: str, events: Sequence[Mapping[str, object]]) -> None:
        task = self._bars.tasks[self._tasks[name]]
        if not events or task.finished_time is not None:
            return
        if not task.started:
            self._bars.start_task(task.id)
        steps = [event for event in events if event["kind"] == "step"]
        description = (
            f"loss {_bits(steps[-1]['loss']):.2f} bits per byte" if steps else "evaluating the untrained model"
        )
        if events[-1]["kind"] == "diverged":
            description = f"diverged at step {events[-1]['step']}"
            self._bars.stop_task(task.id)
        self._bars.update(task.id, completed=len(steps), description=description)

    def _line(self, name: str) -> str:
        state = self._bars.tasks[self._tasks[name]]
        if state.finished or state.stop_time is not None:
            self._reported.add(name)
        return f"{name} {state.completed:.0f}/{state.total:.0f} {state.description}"


def _bits(nats: object) -> float:
    assert isinstance(nats, float)
    return nats / math.log(2.0)


def _judge(folder: Path, plans: Mapping[str, Plan]) -> tuple[list[library.Outcome], library.Baselines]:
    plan = next(iter(plans.values()))
    corpus = load_corpus(plan.text, plan.held_out)
    baselines = library.measure_baselines(corpus, plan.train.eval_bytes)
    return [library.read_outcome(folder / name, baselines.unigram) for name in plans], baselines


def _conclude(screen: Console, folder: Path, outcomes: Sequence[library.Outcome], baselines: library.Baselines) -> None:
    screen.print(_table(outcomes, baselines))
    library.write_results(folder, outcomes, baselines)
    draw(folder / library.FIGURE_FILE, outcomes, _LABELS, baselines)
    learned = [outcome for outcome in outcomes if outcome.verdict == "learned"]
    if learned:
        best = min(learned, key=lambda outcome: outcome.bits_per_byte)
        _show_sample(screen, folder / best.name)
    screen.print(f"\nFigure   {folder / library.FIGURE_FILE}")
    screen.print(f"Numbers  {folder / library.RESULTS_FILE}")
    screen.print(f"Runs     {', '.join(str(folder / outcome.name) for outcome in outcomes)}")
    if learned:
        screen.print(f"Try it   {generate_command(folder / best.name)}")
    _report(screen, [folder / outcome.name for outcome in outcomes])


def _report(screen: Console, runs: Sequence[Path]) -> None:
    """Print the monitor's verdict on every run, and the path of its report."""
    screen.print("\nThe monitor's verdicts:")
    for run in runs:
        story = read_run(run)
        page = write_page(story, run / REPORT_FILE)
        screen.print(f"  {_LABELS[run.name]}: {harmless(judge(story).sentence, one_line=True)}")
        screen.print(f"    Report: {page}")


def _table(outcomes: Sequence[library.Outcome], baselines: library.Baselines) -> Table:
    table = Table(
        title="\nHeld-out text, in bits per byte (lower is better)",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("model", no_wrap=True)
    for heading in ("bits/byte", "largest\ngradient", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for outcome in outcomes:
        at = f", step {outcome.diverged_at}" if outcome.verdict == "diverged" else ""
        table.add_row(
            _LABELS[outcome.name],
            _number(outcome.bits_per_byte, ".3f"),
            _number(outcome.largest_grad_norm, ".3g", "–" if outcome.verdict == "unfinished" else "not finite"),
            _number(outcome.tokens_per_second, ",.0f"),
            outcome.verdict + at,
        )
    table.add_section()
    table.add_row("unigram baseline", _number(baselines.unigram, ".3f"), "", "", "")
    table.add_row("xz, primed with the text", _number(baselines.xz, ".3f"), "", "", "")
    return table


def _number(value: float, form: str, otherwise: str = "–") -> str:
    return format(value, form) if math.isfinite(value) else otherwise


def _show_sample(screen: Console, run: Path) -> None:
    model, tokenizer, _ = load_run(run)
    text = "".join(stream_text(model, tokenizer, "And the LORD said", 240, temperature=0.7, seed=1))
    screen.print(f"\nA sample from {_LABELS[run.name]}:\n\nAnd the LORD said{harmless(text)}")
