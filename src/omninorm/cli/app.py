"""The Typer application: one file per command, in the order of the help page."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from omninorm.cli.bench import bench
from omninorm.cli.compare import compare
from omninorm.cli.convert import convert
from omninorm.cli.demo import demo
from omninorm.cli.doctor import doctor
from omninorm.cli.generate import generate
from omninorm.cli.inspect import inspect
from omninorm.cli.report import report
from omninorm.cli.train import train
from omninorm.experiments.provenance import version_of

app = typer.Typer(
    help="Normalization for PyTorch transformers, from the layer to the training run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"omninorm {version_of('omninorm') or '(not installed)'}")
        raise typer.Exit


@app.callback()
def _omninorm(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    # Commands show alarms themselves; the library's log would say them again.
    log = logging.getLogger("omninorm.watch")
    log.propagate = False
    log.addHandler(logging.NullHandler())


for _command in (demo, train, generate, compare, report, inspect, convert, bench, doctor):
    app.command()(_command)
