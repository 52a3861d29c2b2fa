"""A text, the options of a small run, and a folder's content."""

from __future__ import annotations

from pathlib import Path

SENTENCE = "In the beginning God created the heaven and the earth. And the earth was without form, and void.\n"
_OPTIONS = "--d-model 16 --layers 1 --heads 2 --seq-len 16 --batch-size 2 --eval-bytes 64 --threads 1"
SMALL = _OPTIONS.split()


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
