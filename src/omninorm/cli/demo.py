"""`omninorm demo`: one deep transformer, trained with four normalizations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omninorm.cli.console import DEVICE_HELP

DEPTH, STEPS = 24, 150
VARIANTS = 4  # the library's number, repeated here because importing it would import torch; a test compares both


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Output folder; must be new or empty.", show_default="runs/demo-N")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the interrupted demo in this folder.")] = None,
    depth: Annotated[int | None, typer.Option(help="Number of transformer blocks.", show_default=str(DEPTH))] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of training steps of each run.", show_default=str(STEPS))
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text to train on: a file, or a folder of files.", show_default="King James Bible"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help=DEVICE_HELP, show_default="auto; with --resume, that of the runs")
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of parallel single-threaded workers.")] = VARIANTS,
) -> None:
    """Train a deep transformer four times, changing only its norms, and compare the results.

    The four variants are pre-norm RMSNorm, pre-norm LayerNorm, post-norm RMSNorm and no norm.
    The demo takes about four minutes on two cores; not yet measured on a GPU.
    Ctrl-C saves checkpoints and prints the command to resume.
    """
    from omninorm.cli import demonstrating  # a late import: this module imports torch

    demonstrating.run(out, resume, depth, steps, text, device, workers)
