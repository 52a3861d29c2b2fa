"""The console to which commands print, and the commands that they suggest next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console

from omninorm.errors import ConfigError

_WIDE = 200
CPU_HELP = "Device: auto or cpu; this command does not use GPUs."
DEVICE_HELP = "Device: auto (a GPU if PyTorch sees one), cpu, cuda, cuda:N or mps."


def console() -> Console:
    """Return a console for the current standard output.

    On a terminal its text is styled. Elsewhere it is plain text without control codes, as wide as the tables need; the
    environment variable COLUMNS sets another width.
    """
    if not sys.stdout.isatty():
        width = None if os.environ.get("COLUMNS") else _WIDE
        return Console(
            file=sys.stdout, force_terminal=False, color_system=None, soft_wrap=True, markup=False, emoji=False,
            width=width,
        )  # fmt: skip
    return Console(file=sys.stdout, soft_wrap=True, markup=False, emoji=False, highlight=False)


def program() -> str:
    """Return what to type to run omninorm: its name if the shell finds it, otherwise the path of this program."""
    started = sys.argv[0]
    if Path(started).name != "omninorm" or shutil.which("omninorm") is not None:
        return "omninorm"
    return shlex.quote(started)


def generate_command(folder: Path, prompt: str | None = "In the beginning") -> str:
    """Return the command that generates text from a run. The prompt should suit the text on which it was trained."""
    option = "" if prompt is None else f" --prompt {shlex.quote(prompt)}"
    return f"{program()} generate {shlex.quote(str(folder))}{option}"


def check_on_cpu(command: str, device: str, reason: str) -> None:
    """Raise ConfigError unless `device` is "auto" or "cpu", for a command that runs on the CPU only."""
    if device in ("auto", "cpu"):
        return
    from omninorm.device import find_device  # a late import: this module imports torch

    found = find_device(device)
    raise ConfigError(f"omninorm {command} runs on the CPU only, because {reason}", str(found), "use --device cpu")


def resume_command(folder: Path) -> str:
    return f"{program()} train --resume {shlex.quote(str(folder))}"
