"""Checkpoints of a model sharded over two processes can be read by any number of processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import distributed_checkpoints as checkpoints
from helpers.distributed import run_in_processes
from safetensors.torch import save_file

from omninorm.errors import RunError
from omninorm.experiments import build_optimizer, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow  # processes that import torch


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_in_processes(2, checkpoints.save, folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy" / "checkpoints" / "step-4"


def test_the_model_is_one_file_and_each_process_writes_its_moments(saved: Path) -> None:
    assert os.listdir(saved / "checkpoints") == ["step-4"]
    step = saved / "checkpoints" / "step-4"
    files = {path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()}
    parts = {f"optimizer/shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)}
    assert files == {"model.safetensors", "state.json", *parts}


def test_one_process_reads_the_same_bits(saved: Path) -> None:
    checkpoints.check(saved, checkpoints.model(5))


def test_the_model_alone_can_be_read(saved: Path) -> None:
    made = checkpoints.model(5)
    load_checkpoint(saved / "checkpoints", 4, made)
    expected = checkpoints.load_file(saved / checkpoints.EXPECTED)
    assert all(torch.equal(value, expected[f"{name}.value"]) for name, value in made.named_parameters())


@pytest.mark.parametrize(("count", "parallel"), [(3, "fsdp"), (2, "ddp")])
def test_other_numbers_of_processes_read_the_same_bits(saved: Path, count: int, parallel: str) -> None:
    run_in_processes(count, checkpoints.load, saved, parallel)


def test_two_processes_read_the_checkpoint_of_one(tmp_path: Path) -> None:
    made = checkpoints.model(0)
    optimizer = checkpoints.train(made)
    torch.manual_seed(3)
    save_checkpoint(tmp_path / "checkpoints", 4, made, optimizer, 1)
    expected = {**checkpoints.everything(made, optimizer), "random": torch.rand(3)}
    save_file(expected, tmp_path / checkpoints.EXPECTED)
    run_in_processes(2, checkpoints.load, tmp_path, "fsdp")


def test_a_process_that_fails_to_write_leaves_no_partial_checkpoint(copied: Path) -> None:
    run_in_processes(2, checkpoints.fail, copied.parent.parent)
    assert os.listdir(copied.parent) == ["step-4"]
    checkpoints.check(copied.parent.parent, checkpoints.model(5))


def part(step: Path) -> Path:
    return sorted((step / "optimizer").iterdir())[1]


def truncate(step: Path) -> None:
    with open(part(step), "r+b") as file:
        file.truncate(part(step).stat().st_size - 7)


def flip(step: Path) -> None:
    content = bytearray(part(step).read_bytes())
    content[-3] ^= 1
    part(step).write_bytes(content)


def rename(step: Path, name: str) -> None:
    """state.json names another file in the place of a part."""
    file = step / "state.json"
    state = json.loads(file.read_bytes())
    state["files"][name] = state["files"].pop(part(step).relative_to(step).as_posix())
    file.write_text(json.dumps(state))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        lambda step: part(step).unlink(),
        lambda step: rename(step, "optimizer/../../../secret.safetensors"),
        lambda step: rename(step, "optimizer.safetensors"),
    ],
    ids=["truncated", "one bit changed", "missing", "outside of the folder", "another name"],
)
def test_a_damaged_part_is_found_before_anything_is_changed(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied)
    made = checkpoints.model(5)
    before = {name: value.detach().clone() for name, value in made.named_parameters()}
    with pytest.raises(RunError, match=r"[Cc]heckpoint"):
        load_checkpoint(copied.parent, 4, made, build_optimizer(made, checkpoints.SETTINGS))
    assert all(torch.equal(before[name], value) for name, value in made.named_parameters())
