"""The command line: `omninorm` and `python -m omninorm`."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Sequence

from omninorm.errors import OmninormError

_NEEDED = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 1 the training diverged, 2 bad input (one sentence on stderr), 130 and 143
    interrupted by Ctrl-C and SIGTERM.

    Args:
        arguments: the command line without the program's name; None means this process's own.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        needs = " and ".join(missing)
        print(f'omninorm: the command line needs {needs}; install with pip install "omninorm[train]"', file=sys.stderr)
        sys.exit(2)
    from omninorm.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(given, prog_name="omninorm", obj=["omninorm", *given])
    except OmninormError as error:
        print(f"omninorm: {error}", file=sys.stderr)
        sys.exit(2)
