"""`torchrun … -m omninorm train`: several processes train the run of one; if one dies, all end and the run resumes.

Each launch of torchrun takes 20 seconds of CPU time, so refusals and resumed runs use forks with torchrun's variables.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cli_process import Process
from helpers.waiting import PATIENCE, wait_until
from safetensors.torch import load_file

from omninorm.record import read_history, read_record

OPTIONS = [
    "--d-model", "32", "--layers", "2", "--heads", "2", "--batch-size", "4", "--grad-accumulation", "2", "--seq-len", "32",
    "--eval-every", "6", "--checkpoint-every", "6", "--keep-checkpoints", "9", "--log-every", "1", "--eval-bytes", "2000",
    "--warmup-steps", "3",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


# Many more than the step of the checkpoint after which a process is killed.
STEPS = "120"


def command(processes: int, *arguments: str | Path) -> list[str]:
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *together, "-m", "omninorm", "train", *map(str, arguments)]


def train_alone(folder: Path, *arguments: str | Path) -> None:
    """Train in one process, whose output is written to the folder."""
    process = Process(folder, "train", *arguments)
    code, _, err = process.wait()
    process.end()
    assert code == 0, err


def train_together(folder: Path, processes: int, *arguments: str | Path) -> tuple[list[int], str]:
    """Train in processes with the variables that torchrun sets, but without torchrun; return exit codes and stderr."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    count = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    running = []
    for rank in map(str, range(processes)):
        (folder / rank).mkdir()
        variables = {**place, **count, "RANK": rank, "LOCAL_RANK": rank}
        running.append(Process(folder / rank, "train", *arguments, environment=variables))
    results = [process.wait() for process in running]
    for process in running:
        process.end()
    return [code for code, _, _ in results], "".join(err for _, _, err in results)


def train(processes: int, *arguments: str | Path) -> str:
    done = subprocess.run(command(processes, *arguments), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_record(folder / "record.jsonl") if event["kind"] == "step"]


def alarms(folder: Path) -> list[tuple[int, str]]:
    return [
        (event["step"], event["rule"]) for event in read_history(folder / "record.jsonl") if event["kind"] == "alarm"
    ]


def weights(folder: Path, step: int) -> torch.Tensor:
    tensors = load_file(folder / "checkpoints" / f"step-{step}" / "model.safetensors")
    return torch.cat([value.flatten() for _, value in sorted(tensors.items())])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train_alone(folder, *OPTIONS, "--steps", STEPS, "--out", folder / "run", "--threads", "1")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(alone: Path, tmp_path: Path, parallel: str) -> None:
    said = train(2, *OPTIONS, "--steps", STEPS, "--out", tmp_path / "run", "--parallel", parallel)
    assert said.count("Done: ") == 1, "only one process prints"
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(alone)) == int(STEPS)
    # Adam divides by the gradients' size, which amplifies the rounding errors of tiny ones.
    torch.testing.assert_close(weights(tmp_path / "run", int(STEPS)), weights(alone, int(STEPS)), rtol=1e-3, atol=1e-4)
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "record.jsonl", "record-rank1.jsonl", "checkpoints", "report.html"}
    watched = read_history(tmp_path / "run" / "record-rank1.jsonl")
    assert (watched[0]["rank"], watched[0]["world_size"]) == (1, 2)
    assert any(event["kind"] == "sample" for event in watched)
    assert alarms(tmp_path / "run") == alarms(alone)
    written = {path.name for path in (tmp_path / "run" / "checkpoints" / f"step-{STEPS}").iterdir()}
    assert written - {"model.safetensors", "state.json"} == {
        "optimizer" if parallel == "fsdp" else "optimizer.safetensors"
    }


@pytest.mark.slow
def test_if_one_process_is_killed_the_others_end_and_one_resumes_the_run(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = command(2, *OPTIONS, "--steps", STEPS, "--out", folder)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(process, folder)
    os.kill(worker(process.pid, rank=1), signal.SIGKILL)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "Another process of this run is gone" in said
    newest = max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())
    assert 6 <= newest < int(STEPS)
    train_alone(tmp_path, "--resume", folder)
    by_step = {
        event["step"]: event["loss"] for event in read_record(folder / "record.jsonl") if event["kind"] == "step"
    }
    assert [by_step[step] for step in range(1, int(STEPS) + 1)] == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize(
    ("parallel", "resumed_by"),
    [
        pytest.param("ddp", [(2, "fsdp")], marks=pytest.mark.slow),
        pytest.param("fsdp", [(1, "ddp")], marks=pytest.mark.slow),
        pytest.param("ddp", [(4, "ddp")], marks=pytest.mark.exhaustive),
        pytest.param("fsdp", [(2, "ddp")], marks=pytest.mark.exhaustive),
    ],
)
def test_ctrl_c_stops_all_after_a_step_and_any_number_resumes(
    alone: Path, tmp_path: Path, parallel: str, resumed_by: list[tuple[int, str]]
) -> None:
    """The terminal sends it to every process, and torchrun passes it on."""
    folder = tmp_path / "run"
    arguments = command(2, *OPTIONS, "--steps", STEPS, "--out", folder, "--parallel", parallel)
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_checkpoint(process, folder)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    stopped = int(re.search(r"Stopped after step (\d+)", said)[1])
    assert (folder / "checkpoints" / f"step-{stopped}" / "model.safetensors").exists()
    assert 6 <= stopped < int(STEPS)
    for count, way in resumed_by:
        copy = tmp_path / f"{count}-{way}"
        shutil.copytree(folder, copy)
        if count == 1:
            train_alone(tmp_path, "--resume", copy, "--parallel", way)
        else:
            codes, err = train_together(tmp_path, count, "--resume", copy, "--parallel", way)
            assert not any(codes), err
        by_step = {
            event["step"]: event["loss"] for event in read_record(copy / "record.jsonl") if event["kind"] == "step"
        }
        assert [by_step[step] for step in range(1, int(STEPS) + 1)] == pytest.approx(losses(alone), rel=1e-5)


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    assert wait_until((folder / "checkpoints" / "step-6").exists, lambda: process.poll() is None)


def worker(launcher: int, rank: int) -> int:
    """The process that torchrun gave a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(re.search(r"PPid:\s+(\d+)", (path / "status").read_text())[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError("no such process")


@pytest.mark.slow
def test_a_batch_that_cannot_be_divided_is_refused_once(tmp_path: Path) -> None:
    codes, err = train_together(tmp_path, 2, *OPTIONS, "--batch-size", "3", "--out", tmp_path / "run")
    assert all(codes)
    assert err.count("omninorm: --batch-size must be a multiple of the 2 processes, got 3") == 1
    assert not (tmp_path / "run").exists()


# A process without memory: its first forward pass raises what PyTorch does.
NO_MEMORY = """
import os, sys, torch
from omninorm.cli import main
from omninorm.thinker import Thinker

def fail(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

if os.environ["RANK"] in sys.argv.pop(1):
    Thinker.forward = fail
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "ranks", [pytest.param("1", marks=pytest.mark.slow), pytest.param("01", marks=pytest.mark.exhaustive)]
)
def test_a_step_that_does_not_fit_leaves_no_folder(tmp_path: Path, ranks: str) -> None:
    program, run = tmp_path / "program.py", tmp_path / "run"
    program.write_text(NO_MEMORY)
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    arguments = [*together, ranks, "train", *OPTIONS, "--steps", "3", "--out", str(run)]
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "omninorm: A training step must fit in memory, got --batch-size 4, --seq-len 32." in done.stderr
    assert not run.exists()


def test_a_device_that_is_not_here_is_refused_by_one_process_only(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    codes, err = train_together(tmp_path, 2, "--device", "cuda", "--out", tmp_path / "run")
    assert all(codes)
    (line,) = [line for line in err.splitlines() if line.startswith("omninorm:")]
    assert "The device cuda is not available" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_refused_by_one_process_only(tmp_path: Path) -> None:
    codes, err = train_together(tmp_path, 2, "--resume", tmp_path / "none")
    assert all(codes)
    (line,) = [line for line in err.splitlines() if line.startswith("omninorm:")]
    assert f"No such file or folder: {tmp_path / 'none'}" in line
