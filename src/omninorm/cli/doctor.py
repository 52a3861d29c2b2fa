"""`omninorm doctor`: what is here, what is missing, and how to get it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from omninorm.bench.config import all_threads
from omninorm.cli.console import console
from omninorm.experiments.provenance import OPTIONAL, versions
from omninorm.kernels.dispatch import backends


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show versions, CPU, memory, threads and back ends, and what is missing for the rest."""
    facts = inspect_machine()
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    screen = console()
    screen.print(_table("Machine", [(name, str(value)) for name, value in facts["machine"].items()]))
    screen.print(_table("Packages", [(name, value or "not installed") for name, value in facts["versions"].items()]))
    screen.print("Back ends", style="italic")
    for each in facts["backends"]:
        # Not in a table: a reason and its remedy are too long for a column, and the remedy is there to be copied.
        screen.print(f"{each['name']} {'runs' if each['available'] else 'no'}: {each['reason']}")
    for line in facts["missing"]:
        screen.print(f"{line['package']} is missing ({line['purpose']}): {line['remedy']}")
    if not facts["missing"]:
        screen.print("Nothing is missing.")


def inspect_machine() -> dict[str, Any]:
    """Everything that doctor shows, as plain JSON values."""
    found = versions()
    missing = [
        {"package": name, "purpose": purpose, "remedy": f'pip install "omninorm[{extra}]"'}
        for name, (purpose, extra) in OPTIONAL.items()
        if found[name] is None
    ]
    return {
        "versions": found,
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": all_threads(),
            "threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
            "cuda": torch.cuda.is_available(),
            "compiler": _compiler(),
        },
        "backends": [backend._asdict() for backend in backends()],
        "missing": missing,
    }


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _compiler() -> str | None:
    """The C++ compiler that would build the operators, as setup.py chooses it, in its own words."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            told = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace").stdout
            return next(iter(told.splitlines()), shlex.join(command))
    return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
