"""Runs that are interrupted or killed in reality and then resumed are bit-identical to an uninterrupted one."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from helpers.cli import SENTENCE
from helpers.cli_process import Process
from helpers.waiting import wait_until

from omninorm.cli import main
from omninorm.experiments import list_checkpoints, read_history, read_record

STEPS = 40
OPTIONS = (
    f"--d-model 32 --layers 2 --heads 2 --seq-len 32 --batch-size 4 --steps {STEPS} --eval-every 7 --eval-bytes 256 "
    "--threads 1 --tokenizer bpe --vocab-size 300 --checkpoint-every"
).split()


def _result(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Parameters, moments, step counters and random state as stored bytes, and the record without its clock."""
    newest = folder / "checkpoints" / f"step-{list_checkpoints(folder / 'checkpoints')[-1]}"
    record = [{k: v for k, v in event.items() if k != "clock"} for event in read_record(folder / "record.jsonl")]
    return {file.name: file.read_bytes() for file in newest.iterdir()}, record


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number}. {SENTENCE}" for number in range(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """The result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    process = Process(folder, "train", "--text", text, "--out", folder / "run", *OPTIONS, 5)
    code, _, err = process.wait()
    process.end()
    assert (code, err) == (0, "")
    files, record = _result(folder / "run")
    assert sorted(files) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert [event["step"] for event in record if event["kind"] == "step"] == list(range(1, STEPS + 1))
    return files, record


# Between two looks at a file, in seconds: runs are killed at random moments, some while a file is written.
PAUSE = 0.0002


def _lines(folder: Path) -> int:
    path = folder / "record.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_an_interrupted_run_resumes_bit_identically(number, code, text, straight, spawn, tmp_path, capsys):
    folder = tmp_path / "a run"
    process = spawn("train", "--text", text, "--out", folder, *OPTIONS, 5)
    assert wait_until(lambda: _lines(folder) >= 4, process.running, PAUSE)
    process.signal(signal.SIGSTOP)  # or it might finish before the other process starts
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--resume", str(folder)])
    assert f"Another process is writing the run in {folder}" in capsys.readouterr().err
    process.signal(number)
    process.signal(signal.SIGCONT)
    exit_code, out, err = process.wait()
    assert (exit_code, err) == (code, "")
    last = read_history(folder / "record.jsonl")[-1]
    assert (last["kind"], last["signal"]) == ("interrupted", number)
    assert 1 <= last["step"] < STEPS
    assert list_checkpoints(folder / "checkpoints")[-1] == last["step"]

    printed = re.search(r"^  omninorm (train --resume .*)$", out, re.M)
    exit_code, out, err = spawn(*shlex.split(printed.group(1))).wait()
    assert (exit_code, err) == (0, "")
    assert "Done:" in out
    assert _result(folder) == straight


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_saves_a_checkpoint(text, straight, spawn, tmp_path):
    """`python -m omninorm` on a real terminal: its Ctrl-C becomes the signal, and the progress is drawn on it."""
    folder = tmp_path / "run"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "omninorm", "train", "--text", str(text), "--out", str(folder), *OPTIONS, "5"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(theirs)
    try:
        assert wait_until(lambda: _lines(folder) >= 4, lambda: process.poll() is None, PAUSE)
        os.write(ours, b"\x03")
        shown = _read_all(ours)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"\x1b[" in shown
    assert b"tok/s" in shown
    assert f"omninorm train --resume {folder}".encode() in shown
    assert spawn("train", "--resume", folder).wait()[0] == 0
    assert _result(folder) == straight


def _read_all(descriptor: int) -> bytes:
    content = b""
    while True:
        try:
            content += os.read(descriptor, 65536)
        except OSError:  # the terminal's other end is closed
            return content


@pytest.mark.slow
def test_a_run_killed_at_random_moments_resumes_bit_identically(text, straight, spawn, tmp_path):
    folder = tmp_path / "run"
    draw = random.Random(20)
    arguments = ["train", "--text", text, "--out", folder, *OPTIONS, 5]
    kills = 0
    for _ in range(8):
        process = spawn(*arguments)
        target = _lines(folder) + draw.randint(2, 9)
        wait_until(lambda target=target: _lines(folder) >= target, process.running, PAUSE)
        time.sleep(draw.uniform(0.0, 0.02))
        process.signal(signal.SIGKILL)
        if process.wait()[0] != -signal.SIGKILL:
            break  # it finished before the kill
        kills += 1
        arguments = ["train", "--resume", folder]
    assert kills >= 3
    exit_code, _, err = spawn(*arguments).wait()
    assert (exit_code, err) == (0, "")
    assert _result(folder) == straight


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_resumes_bit_identically(text, straight, spawn, tmp_path):
    """With a checkpoint at every step; neither the record nor the last checkpoint depends on how many there are."""
    folder, hits = tmp_path / "run", 0
    checkpoints = folder / "checkpoints"
    arguments = ["train", "--text", text, "--out", folder, *OPTIONS, 1]

    def half_written() -> bool:
        return checkpoints.exists() and any(name.startswith(".tmp-step-") for name in os.listdir(checkpoints))

    for _ in range(6):
        process = spawn(*arguments)
        # A resumed process first removes what the killed one left; only what it writes itself counts.
        target = _lines(folder) + 3
        wait_until(lambda target=target: _lines(folder) >= target and half_written(), process.running, PAUSE)
        process.signal(signal.SIGKILL)
        assert process.wait()[0] == -signal.SIGKILL
        hits += half_written()
        arguments = ["train", "--resume", folder]
        if hits == 3:
            break
    assert hits >= 1
    exit_code, _, err = spawn(*arguments).wait()
    assert (exit_code, err) == (0, "")
    assert _result(folder) == straight
    assert not half_written()
