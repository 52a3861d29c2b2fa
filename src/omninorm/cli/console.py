"""The console that commands print to, and the commands that they suggest next."""

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
    """Return standard output as it is now: styled on a terminal, plain text without control codes anywhere else, and
    there as wide as its tables unless COLUMNS sets a width.
    """
    if not sys.stdout.isatty():
        width = None if os.environ.get("COLUMNS") else _WIDE
        return Console(
            file=sys.stdout, force_terminal=False, color_system=None, soft_wrap=True, markup=False, emoji=False,
            width=width,
        )  # fmt: skip
    return Console(file=sys.stdout, soft_wrap=True, markup=False, emoji=False, highlight=False)


def program() -> str:
    """Return what to type to run omninorm: its name if the shell finds it, else the path that it was started by."""
    started = sys.argv[0]
    if Path(started).name != "omninorm" or shutil.which("omninorm") is not None:
        return "omninorm"
    return shlex.quote(started)


def generate_command(folder: Path, prompt: str | None = "In the beginning") -> str:
    """Return the command that generates text from a run; the prompt should suit the text that it was trained on."""
    option = "" if prompt is None else f" --prompt {shlex.quote(prompt)}"
    return f"{program()} generate {shlex.quote(str(folder))}{option}"


def check_on_cpu(command: str, device: str, reason: str) -> None:
    """Raise ConfigError for a device that a command does not use, or that is not here."""
    if device in ("auto", "cpu"):
        return
    from omninorm.device import find_device  # here, because it imports torch

    found = find_device(device)
    raise ConfigError(f"omninorm {command} runs on the CPU only, because {reason}", str(found), "use --device cpu")


def resume_command(folder: Path) -> str:
    return f"{program()} train --resume {shlex.quote(str(folder))}"
