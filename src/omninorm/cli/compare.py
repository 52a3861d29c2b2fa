"""`omninorm compare`: a grid of norms, placements, depths, learning rates and seeds, with paired statistics."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from omninorm.cli.console import DEVICE_HELP, console
from omninorm.config import check_choice, check_count, check_number

_DEFAULT = "quick"


def compare(
    plan: Annotated[
        Path | None, typer.Argument(help="The plan: a YAML, TOML or JSON file.", show_default="a preset")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A plan by name: quick, chapter (all claims), placements, residuals, or one claim such as C3.",
            show_default=_DEFAULT,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder, new or empty.", show_default="runs/compare-N")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the comparison in this folder.")] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Training text: a file, or a folder of text files.", show_default="King James Bible"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Your model factory, package.module:function, called with (norm, depth, vocab_size).",
            show_default="Thinker",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the cluster that RAY_ADDRESS names, or this machine without one.")
    ] = "local",
    device: Annotated[
        str, typer.Option(help=f"{DEVICE_HELP} The workers share all GPUs, or one if it is numbered.")
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of parallel single-threaded workers.", show_default="cores; on GPUs, as many as fit in memory"
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Time limit for one run, in seconds.")] = 1800.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its estimated duration, then exit.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on stdout and everything else on stderr.")
    ] = False,
) -> None:
    """Compare norms and placements at your depth and on your text, with confidence intervals and verdicts.

    Ctrl-C stops the comparison; --resume continues it and does not repeat finished runs. Failed runs are retried once
    and reported.
    """
    from omninorm.bench.config import all_threads  # late imports: this module imports torch,
    from omninorm.cli import comparing  # and this one needs packages that the other commands do not need
    from omninorm.device import find_devices
    from omninorm.experiments.compare.crew import usual_workers

    if workers is not None:
        check_count("workers", workers)
    check_number("time_limit", time_limit, above=0.0)
    check_choice("engine", engine, ("local", "ray"))
    if engine == "ray":
        check_choice("device", device, ("auto", "cpu", "cuda"))  # a GPU of this machine cannot be chosen
        importlib.import_module("omninorm.experiments.compare.on_ray")  # without Ray, fail before a folder is created
    devices = find_devices("cpu" if engine == "ray" else device)
    screen = Console(file=sys.stderr, soft_wrap=True, markup=False) if as_json else console()
    if resume is None:
        job = comparing.begin(plan, preset or (None if plan else _DEFAULT), text, model, out)
    else:
        others = {"PLAN": plan, "--preset": preset, "--text": text, "--model": model, "--out": out}
        job = comparing.resume_job(resume, others)
    count = usual_workers(all_threads(), devices, job.plan.cells().values()) if workers is None else workers
    crew = comparing.Crew(engine, count, time_limit, device, devices)
    todo = job.introduce(screen, crew)
    if not dry_run:
        job.run(screen, todo, crew)
        job.conclude(screen, as_json)
