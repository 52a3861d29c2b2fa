"""Fixtures that call the command line in this process, or in a separate process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.cli import SENTENCE, SMALL
from helpers.cli_process import Process

from omninorm.cli import main


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
