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
from omninorm.errors import OmninormError, for_checkout

_NEEDED = ("typer", "rich")
BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 70, 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code.

    0: done. 1: the training diverged, or an inspected checkpoint fails. 2: bad input, reported on stderr in one line.
    70: an unexpected error. 130 and 143: interrupted by Ctrl-C and by SIGTERM.

    Args:
        arguments: the command line without the program's name; None means this process's own.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    _prepare_streams()
    if arguments is None and hasattr(signal, "SIGPIPE"):
        # With the default handler, `omninorm … | head` ends without an error message, like other programs.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        needs = " and ".join(missing)
        _fail(for_checkout(f'The command line needs {needs}. Install with pip install "omninorm[train]".'), BAD_INPUT)
    try:
        from omninorm.cli.app import app

        app(given, prog_name="omninorm", obj=["omninorm", *given])
    except OmninormError as error:
        _fail(str(error), BAD_INPUT)
    except OSError as error:
        _fail(f"Reading or writing failed: {error}. Check the disk and the permissions.", BAD_INPUT)
    except KeyboardInterrupt:
        _fail("Interrupted.", INTERRUPTED)
    except ImportError as error:
        if "OMNINORM_TRACEBACK" in os.environ or (error.name or "").startswith("omninorm"):
            raise
        _fail(f"Cannot import a module: {error}. Reinstall Python or the package that needs it.", BAD_INPUT)
    except Exception as error:
        if "OMNINORM_TRACEBACK" in os.environ:
            raise
        what = f"{type(error).__name__}: {error}".rstrip(". ")
        _fail(f"Unexpected error: {what}. Set OMNINORM_TRACEBACK=1 for a traceback.", UNEXPECTED)
    finally:
        _flush()


def _prepare_streams() -> None:
    """Make stdout and stderr usable: one may be closed, or its encoding may lack characters."""
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
    """Flush stdout. If the disk is full, this is a one-line error instead of a traceback when Python exits."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"Could not write the output: {error}. Check the disk.", BAD_INPUT)
