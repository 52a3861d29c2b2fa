"""Whatever is wrong: one sentence on stderr, exit code 2, nothing overwritten and nothing half-written."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess

import pytest
from helpers.cli import SENTENCE, SMALL, tree

from omninorm.experiments import list_checkpoints


def _refused(outcome, *parts: str) -> None:
    assert outcome.code == 2
    assert outcome.err.startswith("omninorm: ")
    assert outcome.err.count("\n") == 1
    assert ", got " in outcome.err
    assert "; " in outcome.err
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--lr", "nan"], ["lr must be a finite number > 0", "nan"]),
        (["--lr", "inf"], ["lr must be a finite number > 0", "inf"]),
        (["--lr", "-1"], ["lr must be", "-1"]),
        (["--eps", "nan"], ["norm_eps must be a finite number ≥ 0", "nan"]),
        (["--eps", "-1e-6"], ["norm_eps must be", "-1e-06"]),
        (["--weight-decay", "nan"], ["weight_decay"]),
        (["--grad-clip", "nan"], ["grad_clip"]),
        (["--grad-clip", "0"], ["grad_clip"]),
        (["--grad-clip", "1", "--no-grad-clip"], ["either clipped or not"]),
        (["--betas", "0.9", "nan"], ["betas"]),
        (["--adam-eps", "nan"], ["adam_eps"]),
        (["--min-lr-ratio", "nan"], ["min_lr_ratio"]),
        (["--held-out", "nan"], ["held_out"]),
        (["--steps", "0"], ["steps must be an integer ≥ 1"]),
        (["--batch-size", "-2"], ["batch_size"]),
        (["--d-model", "0"], ["d_model must be an integer ≥ 1"]),
        (["--layers", "0"], ["n_layers"]),
        (["--heads", "3"], ["d_model must be a multiple of n_heads"]),
        (["--threads", "0"], ["threads must be an integer ≥ 1"]),
        (["--threads", "9" * 30], ["threads must be at most 4096"]),
        (["--seed", "-1"], ["seed must be an integer ≥ 0"]),
        (["--norm", "batchnorm"], ["normalization must be one of rmsnorm, layernorm", "'batchnorm'"]),
        (["--placement", "middle"], ["norm_placement must be one of none, post, pre", "'middle'"]),
        (["--norm", "none", "--qk-norm"], ["qk_norm needs a norm"]),
        (["--precision", "fp64"], ["precision must be one of fp32, bf16"]),
        (["--tokenizer", "words"], ["tokenizer must be one of byte, bpe"]),
        (["--vocab-size", "300"], ["the byte tokenizer has 256 tokens"]),
        (["--tokenizer", "bpe", "--vocab-size", "256"], ["≥ 257"]),
        (["--warmup-steps", "9"], ["the warm-up must end within the run"]),
        (["--seq-len", "4000"], ["must have at least seq_len + 1 = 4001 tokens"]),
        (["--eval-bytes", "10"], ["the held-out part of the text", "10 in"]),
    ],
)
def test_bad_options(command, small, tmp_path, options, parts):
    run = tmp_path / "run"
    _refused(command("train", *small, *options, "--out", run), *parts)
    assert not run.exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "No such file or directory"),
        (b"", "must not be empty"),
        (b"\x7fELF\0\0\0" * 1000, "a NUL at byte 4"),
        (b"\xff\xfe" + "wide".encode("utf-16-le"), "without NUL"),
        (b"caf\xe9 " * 100, "the byte 0xe9 at 3"),
        (b"too short", "must have at least seq_len + 1 = 17 tokens"),
    ],
)
def test_bad_text(command, tmp_path, content, part):
    path, run = tmp_path / "text.txt", tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    _refused(command("train", "--text", path, *SMALL, "--out", run), part, str(path))
    assert not run.exists()


def test_a_batch_that_is_too_large_for_the_memory(command, small, tmp_path):
    outcome = command("train", *small, "--batch-size", str(10**13), "--out", tmp_path / "run")
    _refused(outcome, "a step must fit in memory", "batch_size=10000000000000")


def test_a_run_folder_that_exists_is_not_touched(command, small, tmp_path):
    run = tmp_path / "run"
    assert command("train", *small, "--out", run)[0] == 0
    before = tree(run)
    _refused(command("train", *small, "--out", run), "needs an empty or a new folder", str(run), "resume")
    assert tree(run) == before


@pytest.mark.parametrize("below", ["text.txt", "text.txt/run"])
def test_a_folder_that_cannot_be_made(command, small, tmp_path, below):
    before = tree(tmp_path)
    _refused(command("train", *small, "--out", tmp_path / below), str(tmp_path / below), "choose another folder")
    assert tree(tmp_path) == before


def test_an_unwritable_folder(command, small):
    _refused(command("train", *small, "--out", "/proc/run"), "must be writable", "/proc/run", "choose another folder")


@pytest.mark.parametrize("arguments", [["train", "--resume"], ["generate"]])
def test_a_folder_that_is_no_run(command, tmp_path, arguments):
    _refused(command(*arguments, tmp_path), "must have a config.json", str(tmp_path))
    _refused(command(*arguments, tmp_path / "absent"), "must have a config.json", str(tmp_path / "absent"))
    assert tree(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    _refused(command(*arguments, tmp_path), "a Hugging Face model at", "Thinker.from_pretrained")
    assert list(tree(tmp_path)) == ["config.json"]


@pytest.fixture
def interrupted(command, small, tmp_path):
    """A run with checkpoints of steps 2 and 4 that has not written its end."""
    run = tmp_path / "run"
    assert command("train", *small, "--out", run, "--checkpoint-every", 2)[0] == 0
    lines = (run / "record.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "record.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    return run


def test_a_truncated_checkpoint(command, interrupted):
    path = interrupted / "checkpoints" / "step-4" / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    before = tree(interrupted / "checkpoints")
    for arguments in (["train", "--resume"], ["generate"]):
        _refused(command(*arguments, interrupted), "a checkpoint must be whole", str(path), "go back to step-2")
    assert tree(interrupted / "checkpoints") == before
    assert command("generate", interrupted, "--step", 2, "--max-new-tokens", 1)[0] == 0


def test_a_foreign_checkpoint(command, interrupted, small, tmp_path):
    other = tmp_path / "other"
    assert command("train", *small, "--d-model", 32, "--out", other)[0] == 0
    config = (other / "config.json").read_bytes()
    (interrupted / "config.json").write_bytes(config)
    for arguments in (["train", "--resume"], ["generate"]):
        _refused(command(*arguments, interrupted), "of this model must be [256, 32]", "[256, 16] float32 in", "step-4")


def test_a_damaged_config(command, interrupted):
    config = (interrupted / "config.json").read_text(encoding="utf-8")
    path = interrupted / "config.json"
    path.write_text(config.replace('"lr": 0.003', '"lr": NaN'), encoding="utf-8")
    _refused(command("train", "--resume", interrupted), "config.json must describe a run", "lr must be", "nan")
    path.write_text(config[: len(config) // 2], encoding="utf-8")
    _refused(command("generate", interrupted), "config.json must be JSON")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--temperature", "nan"], "temperature must be a finite number ≥ 0"),
        (["--temperature", "-1"], "temperature must be"),
        (["--top-p", "nan"], "top_p"),
        (["--top-k", "0"], "top_k"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--seed", str(2**80)], "seed"),
        (["--prompt", ""], "a prompt must have at least one character"),
        (["--stop", ""], "a stop text must have at least one character"),
        (["--step", "3"], "choose one of 2, 4"),
    ],
)
def test_bad_options_of_generate(command, interrupted, options, part):
    _refused(command("generate", interrupted, *options), part)


def test_a_run_without_a_checkpoint_has_nothing_to_generate_from(command, small, tmp_path):
    run = tmp_path / "run"
    assert command("train", *small, "--lr", 1e30, "--steps", 50, "--out", run, "--schedule", "constant")[0] == 1
    _refused(command("generate", run), "a run must have a checkpoint")


@contextlib.contextmanager
def _small_disk(folder):
    """A place where about 400 kB fit: a file system of that size, or where none may be mounted, files of that size."""
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, earlier[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(command, small, tmp_path):
    """Checkpoints of 80 kB, all of them kept, until the disk is full; with more space the run goes on."""
    disk, later = tmp_path / "disk", tmp_path / "later"
    with _small_disk(disk):
        (disk / "filler").write_bytes(b"x" * 50_000)
        arguments = ["train", *small, "--out", disk / "run", "--checkpoint-every", 1, "--keep-checkpoints", 9]
        code, _, err = command(*arguments, "--steps", 8)
        assert code == 2
        assert err.count("\n") == 1
        assert "a run needs space on its disk" in err or "must be allowed to grow" in err
        steps = list_checkpoints(disk / "run" / "checkpoints")
        names = {name.split("/")[0] for name in tree(disk / "run")}
        assert not [name for name in tree(disk / "run") if ".tmp-" in name]
        assert names <= {".lock", "config.json", "record.jsonl", "checkpoints"}
        subprocess.run(["cp", "-r", str(disk / "run"), str(later)], check=True)
    assert len(steps) < 8
    code, _, err = command("train", "--resume", later)
    assert (code, err) == (0, "")
    assert list_checkpoints(later / "checkpoints") == list(range(1, 9))


def test_a_disk_that_is_full_from_the_start(command, small, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, earlier[1]))
    try:
        outcome = command("train", *small, "--out", disk / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    _refused(outcome, "must be allowed to grow", "ulimit")
    assert list(disk.iterdir()) == []


def test_a_prompt_can_be_any_text(command, interrupted):
    outcome = command("generate", interrupted, "--prompt", "漢字 \x1b[2J " + SENTENCE * 3, "--max-new-tokens", 2)
    assert outcome.code == 0
    assert "\x1b" not in outcome.out
