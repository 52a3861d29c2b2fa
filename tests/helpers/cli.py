"""A text, the options of a small run, the content of a folder, and a quiet call of the command line."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from omninorm.cli import main

SENTENCE = "In the beginning God created the heaven and the earth. And the earth was without form, and void.\n"
_OPTIONS = "--d-model 16 --layers 1 --heads 2 --seq-len 16 --batch-size 2 --eval-bytes 64 --threads 1"
SMALL = _OPTIONS.split()


def call(*arguments: object) -> int:
    """Run a command in this process without output; return its exit code."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            return int(end.code or 0)
    raise AssertionError("main returned")


def tree(path: Path) -> dict[str, bytes]:
    """Return every file below a folder with its content."""
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
