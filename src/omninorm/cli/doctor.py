"""`omninorm doctor`: prints what this machine has, what is missing, and how to install it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from omninorm.cli.console import console


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show versions, CPU, GPUs and back ends, and the commands that install what is missing."""
    from omninorm.cli import machine  # a late import: this module imports torch

    facts = machine.inspect_machine()
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    screen = console()
    screen.print(_table("Machine", [(name, _shown(value)) for name, value in facts["machine"].items()]))
    screen.print(_table("GPU", list(_gpu_rows(facts["gpu"]))))
    screen.print(_table("Packages", [(name, value or "not installed") for name, value in facts["versions"].items()]))
    screen.print("Back ends", style="italic")
    for each in facts["backends"]:
        # This is not a table, because a reason with its remedy is too long for a column.
        screen.print(f"{each['name']}: {'available' if each['available'] else 'unavailable'} ({each['reason']})")
    if not facts["missing"]:
        no_gpu = "" if facts["gpu"]["devices"] else " PyTorch sees no GPU, so everything runs on the CPU."
        screen.print(f"Nothing is missing.{no_gpu}")
        return
    screen.print("Missing", style="italic")
    for each in facts["missing"]:
        screen.print(f"{each['package']} (for {each['purpose']}): {each['remedy']}")


def _gpu_rows(gpu: dict[str, Any]) -> Iterator[tuple[str, str]]:
    devices = gpu["devices"]
    yield "GPUs", str(len(devices)) if devices else "none that PyTorch sees"
    for number, each in enumerate(devices):
        kind = f"capability {each['capability']}, {each['processors']} multiprocessors"
        yield f"GPU {number}", f"{each['name']}, {each['memory_gib']:g} GiB, {kind}"
    yield "runtime", gpu["runtime"] or "none: this PyTorch is built for CPUs only"
    yield "driver", gpu["driver"] or "none"
    yield "Triton", gpu["triton"] or "not installed"
    yield "NCCL", gpu["nccl"] or ("unavailable" if devices else "unavailable (it needs a GPU)")
    yield "MPS", "available" if gpu["mps"] else "unavailable (only on Apple GPUs)"


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
