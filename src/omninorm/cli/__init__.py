"""The command line: `omninorm` and `python -m omninorm`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Sequence

from omninorm.cli.harmless import harmless
from omninorm.errors import OmninormError

_NEEDED = ("typer", "rich")
BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 70, 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 1 the training diverged or an inspected checkpoint fails, 2 bad input (one
    sentence on stderr), 70 an error that omninorm did not foresee, 130 and 143 interrupted by Ctrl-C and SIGTERM.

    Args:
        arguments: the command line without the program's name; None means this process's own.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    _prepare_streams()
    if arguments is None and hasattr(signal, "SIGPIPE"):
        # `omninorm … | head` ends quietly, as other programs do.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        needs = " and ".join(missing)
        _fail(f'the command line needs {needs}; install with pip install "omninorm[train]"', BAD_INPUT)
    try:
        from omninorm.cli.app import app

        app(given, prog_name="omninorm", obj=["omninorm", *given])
    except OmninormError as error:
        _fail(str(error), BAD_INPUT)
    except OSError as error:
        _fail(f"a file or stream failed: {error}; check the disk and the permissions", BAD_INPUT)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if "OMNINORM_TRACEBACK" in os.environ:
            raise
        what = f"{type(error).__name__}: {error}"
        _fail(f"an error that omninorm did not foresee, {what}; set OMNINORM_TRACEBACK=1 to see where", UNEXPECTED)
    finally:
        _flush()


def _prepare_streams() -> None:
    """Makes both streams usable: one may be closed, or of an encoding that lacks a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 open to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(sentence: str, code: int) -> None:
    print(f"omninorm: {harmless(sentence, one_line=True)}", file=sys.stderr)
    sys.exit(code)


def _flush() -> None:
    """What a full disk did not take of stdout must not become a traceback when Python exits."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"the output could not be written: {error}; check the disk", BAD_INPUT)
