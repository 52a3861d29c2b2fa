"""`omninorm bench`: compares omninorm's CPU operators with other implementations and the memory-bandwidth bound."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from omninorm.cli.console import CPU_HELP, check_on_cpu, console
from omninorm.cli.counting import Counting
from omninorm.errors import ConfigError

if TYPE_CHECKING:
    from omninorm.bench import BenchConfig

PATIENCE = 150.0  # BenchConfig's default, repeated here because importing it would import torch; a test compares both
_QUICK: dict[str, Any] = {"rows": (512,), "dtypes": ("fp32", "bf16"), "threads": (1,), "seconds": 0.3}


def bench(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Measure only one thread and 512 rows, without torch.compile and whole models."),
    ] = False,
    rows: Annotated[str | None, typer.Option(help="Row counts, comma-separated.", show_default="512,2048")] = None,
    widths: Annotated[
        str | None, typer.Option(help="Widths, comma-separated.", show_default="576,1024,2048,4096")
    ] = None,
    dtypes: Annotated[
        str | None, typer.Option(help="Dtypes to benchmark: fp32, bf16, fp16 (comma-separated).", show_default="all")
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help='Thread counts, comma-separated; "all" means every core.', show_default="1,all")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time budget per case, in seconds.", show_default="0.7")] = None,
    patience: Annotated[
        float, typer.Option(help="Time limit for a whole model, in seconds; slower models are skipped.")
    ] = PATIENCE,
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Measure torch.compile.")] = None,
    models: Annotated[bool | None, typer.Option("--models/--no-models", help="Measure whole models.")] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the figure bench.png.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Output folder for results.json and bench.png.", show_default="runs/bench-N")
    ] = None,
    device: Annotated[str, typer.Option(help=CPU_HELP)] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on stdout; write files only with --out.")
    ] = False,
) -> None:
    """Benchmark the CPU operators against torch.nn, torch.compile, transformers, onnxruntime and memory bandwidth.

    The benchmark takes about eight minutes on two cores, or one minute with --quick. It does not measure GPUs. Missed
    targets are printed, but do not change the exit code.
    """
    check_on_cpu("bench", device, "it measures the CPU operators; python benchmarks/gpu.py measures the norms on a GPU")
    from omninorm.bench import measure_all  # late imports: these modules import torch
    from omninorm.bench.figure import load_matplotlib
    from omninorm.bench.files import to_json, write
    from omninorm.cli.machine import inspect_machine
    from omninorm.experiments.run_folder import fresh_folder

    config = _config(quick, rows, widths, dtypes, threads, seconds, patience, compile, models)
    folder = out if out is not None or as_json else fresh_folder("bench")
    plot = plot and folder is not None
    if plot:
        load_matplotlib()  # before measuring, so that a missing package is reported immediately
    screen = Console(file=sys.stderr, soft_wrap=True, markup=False) if as_json else console()
    try:
        with Counting(screen) as progress:
            result = {"machine": inspect_machine()["machine"], **measure_all(config, progress)}
    except KeyboardInterrupt:
        screen.print("Stopped. Nothing was written.")
        raise typer.Exit(128 + signal.SIGINT) from None
    written = [] if folder is None else write(folder, result, plot=plot)
    if as_json:
        typer.echo(to_json(result))
        return
    _show(result, written)


def _config(
    quick: bool,
    rows: str | None,
    widths: str | None,
    dtypes: str | None,
    threads: str | None,
    seconds: float | None,
    patience: float,
    compile: bool | None,
    models: bool | None,
) -> BenchConfig:
    """Return the default settings, or those of --quick, with the given options."""
    from omninorm.bench import BenchConfig

    given: dict[str, Any] = {
        "rows": _numbers("rows", rows),
        "widths": _numbers("widths", widths),
        "dtypes": _parts(dtypes),
        "threads": _threads(threads),
        "seconds": seconds,
        "compile": compile,
        "models": models,
    }
    defaults: dict[str, Any] = {"threads": _threads("1,all"), "compile": not quick, "models": not quick}
    chosen = {**defaults, **(_QUICK if quick else {}), "patience": patience}
    return BenchConfig(**{**chosen, **{name: value for name, value in given.items() if value is not None}})


def _parts(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    parts = _parts(text)
    if parts is None:
        return None
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        remedy = f"write for example --{name} 512,2048"
        raise ConfigError(f"--{name} must be integers separated by commas", repr(text), remedy) from None


def _threads(text: str | None) -> tuple[int, ...] | None:
    """Replace "all" by the number of cores; repeated numbers are merged."""
    from omninorm.bench.config import all_threads

    parts = _parts(text)
    if parts is None:
        return None
    numbers = _numbers("threads", ",".join(str(all_threads()) if part == "all" else part for part in parts))
    return tuple(dict.fromkeys(numbers or ()))


def _show(result: dict[str, Any], written: list[Path]) -> None:
    from omninorm.bench import tables

    screen = console()
    tables.show(screen, result)
    for path in written:
        screen.print(f"Written: {path}")
