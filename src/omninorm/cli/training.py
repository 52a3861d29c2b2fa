"""Prints what `omninorm train` reports about a run before and after its training."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from omninorm.cli.console import console, generate_command, resume_command
from omninorm.cli.harmless import harmless

if TYPE_CHECKING:
    from omninorm.experiments.corpus import Corpus
    from omninorm.experiments.events import TrainResult
    from omninorm.experiments.runs import Run

REPORT_FILE = "report.html"
_SHOWN = 5


def introduce(run: Run) -> None:
    import torch

    from omninorm.device import device_name

    corpus, screen = run.corpus, console()
    files = "" if corpus.files == 1 else f"{corpus.files} files, "
    size = f"{len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} held out"
    screen.print(f"Text   {corpus.source}: {files}{size}")
    for skipped in corpus.skipped[:_SHOWN]:
        screen.print(f"       skipped: {harmless(skipped, one_line=True)}")
    if len(corpus.skipped) > _SHOWN:
        screen.print(f"       skipped: {len(corpus.skipped) - _SHOWN} more")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    norm = run.plan.model.norm
    blocks = _count(run.plan.model.n_layers, "block")
    shape = f"{blocks} of width {run.plan.model.d_model}, {parameters:,} parameters"
    screen.print(f"Model  {shape}, {norm.normalization}, placement {norm.norm_placement}")
    screen.print(f"Run    {run.folder.path}, {_count(torch.get_num_threads(), 'thread')}")
    if (device := run.processes.device).type != "cpu":
        screen.print(
            f"Device {device_name(device)}, {run.plan.train.precision}, this command is not yet measured on a GPU"
        )
    for notice in run.notices:
        screen.print(f"Note   {harmless(notice, one_line=True)}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_finished(folder: Path) -> None:
    from omninorm.experiments.runs import read_plan

    steps, screen = read_plan(folder).train.steps, console()
    screen.print(
        f"The run in {folder} is finished: it has done its {_count(steps, 'step')}. Extend it with a larger --steps:"
    )
    screen.print(f"  {resume_command(folder)} --steps {2 * steps}")
    screen.print(f"Generate text with:\n  {generate_command(folder, None)}")


def give_up(run: Run) -> NoReturn:
    """Exit after a second Ctrl-C that came before the step was done; print the command to resume."""
    step = run.folder.newest() or 0
    console().print(f"Stopped immediately; progress after step {step} is lost. Resume with:")
    console().print(f"  {resume_command(run.folder.path)}")
    raise typer.Exit(128 + signal.SIGINT)


def report(run: Run) -> Path | None:
    """Write the run's report.html, if it was monitored."""
    from omninorm.report import write_report

    if run.plan.train.watch_every is None:
        return None
    return write_report(run.folder.path, run.folder.path / REPORT_FILE)


def conclude(result: TrainResult, run: Run, page: Path | None) -> None:
    screen, folder = console(), run.folder.path
    if page is not None:
        screen.print(f"Report: {page}")
    if result.status == "interrupted":
        screen.print(
            f"Stopped after step {result.steps}; a checkpoint was saved. Resume with:\n  {resume_command(folder)}"
        )
        raise typer.Exit(128 + (result.signal or signal.SIGINT))
    if result.status == "diverged":
        screen.print(f"Diverged at step {result.steps}: the loss, the gradient or the weights are no longer finite.")
        screen.print("Try a smaller learning rate, gradient clipping, or another norm or placement.")
        screen.print(f"Output folder: {folder}")
        raise typer.Exit(1)
    speed = f"{result.tokens_per_second:,.0f} tokens/s"
    screen.print(f"Done: {result.bits_per_byte:.3f} bits per byte on held-out text, {speed}.")
    screen.print(f"Output folder: {folder}")
    screen.print(f"Generate text with:\n  {generate_command(folder, _prompt(run.corpus))}")


def _prompt(corpus: Corpus) -> str | None:
    """Return the first words of the text as a prompt for a model that was trained on it; None if not plain text."""
    words = " ".join(corpus.train[:400].decode(errors="ignore").split()[:3])
    return words if words.isprintable() and 0 < len(words) <= 60 else None
