"""The command line, called in this process, or as a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from omninorm.cli import main

from .processes import Process

SENTENCE = "In the beginning God created the heaven and the earth. And the earth was without form, and void.\n"
_OPTIONS = "--d-model 16 --layers 1 --heads 2 --seq-len 16 --batch-size 2 --eval-bytes 64 --threads 1"
SMALL = _OPTIONS.split()


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys) -> Iterator[Callable[..., Outcome]]:
    """Calls `main` with arguments; returns exit code, stdout and stderr."""
    threads = torch.get_num_threads()

    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), out, err)

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def spawn(tmp_path_factory) -> Iterator[Callable[..., Process]]:
    """Starts the command line as a process; what is still running after the test is killed."""
    started: list[Process] = []

    def start(*arguments: object) -> Process:
        started.append(Process(tmp_path_factory.mktemp("process"), *arguments))
        return started[-1]

    yield start
    for process in started:
        process.end()


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 40, encoding="utf-8")
    return path


@pytest.fixture
def small(text_file) -> list[str]:
    """Options for a run that takes a fraction of a second."""
    return ["--text", str(text_file), *SMALL, "--steps", "4"]


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
