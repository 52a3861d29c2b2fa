"""Where commands print, and the commands that they tell the user to type next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console

_WIDE = 200


def console() -> Console:
    """Standard output as it is now: styled on a terminal, plain text without control codes anywhere else, as wide as
    its tables are, unless COLUMNS says how wide.
    """
    if not sys.stdout.isatty():
        width = None if os.environ.get("COLUMNS") else _WIDE
        return Console(
            file=sys.stdout, force_terminal=False, color_system=None, soft_wrap=True, markup=False, emoji=False,
            width=width,
        )  # fmt: skip
    return Console(file=sys.stdout, soft_wrap=True, markup=False, emoji=False, highlight=False)


def program() -> str:
    """What to type to run omninorm here: its name where the shell finds it, else the path that it was started by."""
    started = sys.argv[0]
    if Path(started).name != "omninorm" or shutil.which("omninorm") is not None:
        return "omninorm"
    return shlex.quote(started)


def generate_command(folder: Path) -> str:
    return f'{program()} generate {shlex.quote(str(folder))} --prompt "In the beginning"'


def resume_command(folder: Path) -> str:
    return f"{program()} train --resume {shlex.quote(str(folder))}"
