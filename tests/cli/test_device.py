"""--device on the command line: bad names, absent devices, and memory that runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omninorm.thinker import Thinker

ABSENT = "omninorm: The device cuda is not available, because"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


@pytest.mark.parametrize("name", ["train", "demo", "generate", "compare", "convert", "inspect", "bench"])
@pytest.mark.parametrize(
    ("device", "start"), [("cuda", ABSENT), ("gpu", "omninorm: --device must be one of auto, cpu")]
)
def test_a_device_that_is_not_here_is_refused_before_anything_is_written(
    command, text_file: Path, tmp_path: Path, name: str, device: str, start: str
) -> None:
    out = tmp_path / "out"
    options = {
        "train": ["--text", text_file, "--out", out],
        "demo": ["--text", text_file, "--out", out],
        "generate": [tmp_path],
        "compare": ["--text", text_file, "--out", out],
        "convert": [tmp_path, out, "--fold"],
        "inspect": [tmp_path],
        "bench": ["--out", out],
    }
    code, printed, err = command(name, *options[name], "--device", device)
    assert code == 2
    assert err.startswith(start)
    assert err.count("\n") == 1
    assert printed == ""
    assert not out.exists()


def test_memory_that_runs_out_is_one_sentence_with_half_the_batch_and_leaves_no_folder(
    command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total …")

    monkeypatch.setattr(Thinker, "forward", fail)
    code, _, err = command("train", *small, "--batch-size", 8, "--grad-accumulation", 3, "--out", tmp_path / "run")
    assert code == 2
    assert err == (
        "omninorm: A training step must fit in memory, got --batch-size 8, --seq-len 16. "
        "Start a new run with --batch-size 4 and --grad-accumulation 6.\n"
    )
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_later_keeps_the_run(
    command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert command("train", *small, "--out", run).code == 0

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Thinker, "forward", fail)
    assert command("train", "--resume", run, "--steps", 9, "--device", "cpu").code == 2
    assert (run / "checkpoints" / "step-4" / "model.safetensors").exists()


def test_the_device_and_the_precision_of_a_run_are_recorded(command, small: list[str], tmp_path: Path) -> None:
    import json

    assert command("train", *small, "--out", tmp_path / "run").code == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["device"], config["train"]["precision"]) == ("cpu", "float32")


def test_generate_takes_a_device(command, small: list[str], tmp_path: Path) -> None:
    assert command("train", *small, "--out", tmp_path / "run").code == 0
    code, out, _ = command("generate", tmp_path / "run", "--device", "cpu", "--max-new-tokens", 5, "--seed", 1)
    assert code == 0
    assert out.startswith("\n")


def test_a_comparison_on_ray_takes_no_gpu_by_number(command, text_file: Path) -> None:
    code, _, err = command("compare", "--text", text_file, "--engine", "ray", "--device", "cuda:1", "--dry-run")
    assert code == 2
    assert "--device must be one of auto, cpu, cuda, got 'cuda:1'" in err
