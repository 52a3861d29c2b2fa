"""Bad input: one line on stderr, exit code 2, and no file changed or half-written."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess

import pytest
from helpers.cli import SENTENCE, SMALL, call, tree

from omninorm.experiments import list_checkpoints


def _refused(outcome, *parts: str) -> None:
    assert outcome.code == 2
    assert outcome.err.startswith("omninorm: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith(".\n")
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--lr", "nan"], ["--lr ", "nan", "such as 0.003"]),
        (["--lr", "inf"], ["--lr ", "inf"]),
        (["--lr", "-1"], ["--lr ", "-1"]),
        (["--eps", "nan"], ["--eps", "nan"]),
        (["--eps", "-1e-6"], ["--eps", "-1e-06"]),
        (["--weight-decay", "nan"], ["--weight-decay must"]),
        (["--grad-clip", "nan"], ["--grad-clip must"]),
        (["--grad-clip", "0"], ["--grad-clip must"]),
        (["--grad-clip", "1", "--no-grad-clip"], ["--grad-clip 1.0 with --no-grad-clip"]),
        (["--watch-every", "5", "--no-watch"], ["--watch-every 5 with --no-watch"]),
        (["--betas", "0.9", "nan"], ["Each of --betas"]),
        (["--adam-eps", "nan"], ["--adam-eps must"]),
        (["--min-lr-ratio", "nan"], ["--min-lr-ratio must"]),
        (["--held-out", "nan"], ["--held-out must"]),
        (["--steps", "0"], ["--steps", "0"]),
        (["--batch-size", "-2"], ["--batch-size", "-2"]),
        (["--d-model", "0"], ["--d-model", "0"]),
        (["--layers", "0"], ["--layers must"]),
        (["--heads", "3"], ["--d-model must be a multiple of --heads", "--heads 3"]),
        (["--threads", "0"], ["--threads", "0"]),
        (["--threads", "9" * 30], ["4096", "9" * 30]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--norm", "batchnorm"], ["--norm must", "rmsnorm, layernorm", "'batchnorm'"]),
        (["--placement", "middle"], ["--placement must", "none, post, pre", "'middle'"]),
        (["--norm", "none", "--qk-norm"], ["--qk-norm needs", "--norm none", "--no-qk-norm"]),
        (["--precision", "fp64"], ["--precision must", "float32, bfloat16", "'fp64'"]),
        (["--parallel", "zero3"], ["--parallel must", "ddp, fsdp", "'zero3'"]),
        (["--tokenizer", "words"], ["--tokenizer must", "byte, bpe", "'words'"]),
        (["--vocab-size", "300"], ["256 tokens", "--vocab-size 300", "--tokenizer bpe"]),
        (["--tokenizer", "bpe", "--vocab-size", "256"], ["--vocab-size", "257"]),
        (["--warmup-steps", "9"], ["--warmup-steps 9 with --steps 4"]),
        (["--seq-len", "4000"], ["--seq-len + 1 = 4001 tokens"]),
        (["--eval-bytes", "10"], ["held-out part", "got 10", "--eval-bytes"]),
        (["--steps", "abc"], ["--steps must be an integer, got 'abc'"]),
        (["--steps", "1.5"], ["--steps must be an integer, got '1.5'"]),
        (["--lr", "1e"], ["--lr must be a number, got '1e'"]),
        (["--betas", "0.9", "x"], ["--betas must be 2 numbers, got '0.9 x'"]),
        (["mine.txt"], ["omninorm train takes no arguments, got mine.txt", "--text mine.txt"]),
    ],
)
def test_a_bad_option_of_train_is_refused(command, small, tmp_path, options, parts):
    run = tmp_path / "run"
    _refused(command("train", *small, *options, "--out", run), *parts)
    assert not run.exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "No such file or folder"),
        (b"", "0 bytes"),
        (b"\x7fELF\0\0\0" * 1000, "a NUL at byte 4"),
        (b"\xff\xfe" + "wide".encode("utf-16-le"), "a NUL at byte 3"),
        (b"caf\xe9 " * 100, "the byte 0xe9 at 3"),
        (b"too short", "--seq-len + 1 = 17 tokens"),
    ],
)
def test_a_bad_text_is_refused(command, tmp_path, content, part):
    path, run = tmp_path / "text.txt", tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    _refused(command("train", "--text", path, *SMALL, "--out", run), part, str(path))
    assert not run.exists()


def test_a_batch_that_does_not_fit_in_memory_is_refused(command, small, tmp_path):
    outcome = command("train", *small, "--batch-size", str(10**13), "--out", tmp_path / "run")
    _refused(outcome, "must fit in memory", "--batch-size 10000000000000")


def test_a_folder_that_has_a_run_is_refused_and_unchanged(command, small, interrupted):
    before = tree(interrupted)
    _refused(command("train", *small, "--out", interrupted), str(interrupted), "--resume")
    assert tree(interrupted) == before


@pytest.mark.parametrize("below", ["text.txt", "text.txt/run"])
def test_a_folder_that_cannot_be_created_is_refused(command, small, tmp_path, below):
    before = tree(tmp_path)
    _refused(command("train", *small, "--out", tmp_path / below), str(tmp_path / below))
    assert tree(tmp_path) == before


def test_an_unwritable_folder_is_refused(command, small):
    _refused(command("train", *small, "--out", "/proc/run"), "/proc/run")


@pytest.mark.parametrize("arguments", [["train", "--resume"], ["generate"]])
def test_a_folder_that_is_not_a_run_is_refused(command, tmp_path, arguments):
    _refused(command(*arguments, tmp_path), "config.json", str(tmp_path))
    _refused(command(*arguments, tmp_path / "absent"), f"No such file or folder: {tmp_path / 'absent'}")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("arguments", [["demo", "--resume"], ["compare", "--resume"], ["inspect"], ["report"]])
def test_a_folder_that_does_not_exist_is_refused(command, tmp_path, arguments):
    _refused(command(*arguments, tmp_path / "absent"), "No such file or folder", str(tmp_path / "absent"))
    assert tree(tmp_path) == {}


def test_a_file_of_another_kind_is_refused_with_what_can_be_read(command, text_file):
    _refused(command("inspect", text_file), f"{text_file} is neither", ".safetensors or .gguf file", "run's folder")
    _refused(command("generate", text_file), f"{text_file} is a file", "folder of a run", ".gguf file")


def test_a_hugging_face_folder_cannot_be_resumed(command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    _refused(
        command("train", "--resume", tmp_path), f"{tmp_path} holds a Hugging Face model", "Thinker.from_pretrained"
    )
    assert list(tree(tmp_path)) == ["config.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(SENTENCE * 40, encoding="utf-8")
    options = ["--text", folder / "text.txt", *SMALL, "--steps", 4, "--checkpoint-every", 2, "--no-watch"]
    assert call("train", *options, "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def interrupted(trained, tmp_path):
    """The trained run without the end of its record."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    lines = (run / "record.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "record.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    return run


def test_a_truncated_checkpoint_is_refused_and_the_older_one_is_named(command, interrupted):
    path = interrupted / "checkpoints" / "step-4" / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    before = tree(interrupted / "checkpoints")
    for arguments in (["train", "--resume"], ["generate"]):
        _refused(command(*arguments, interrupted), str(path), "go back to step-2")
    assert tree(interrupted / "checkpoints") == before
    assert command("generate", interrupted, "--step", 2, "--max-new-tokens", 1)[0] == 0


def test_a_checkpoint_of_another_model_is_refused(command, interrupted, small, tmp_path):
    other = tmp_path / "other"
    assert command("train", *small, "--d-model", 32, "--out", other)[0] == 0
    config = (other / "config.json").read_bytes()
    (interrupted / "config.json").write_bytes(config)
    for arguments in (["train", "--resume"], ["generate"]):
        _refused(command(*arguments, interrupted), "(256, 32)", "(256, 16)", "step-4")


def test_a_damaged_config_is_refused(command, interrupted):
    config = (interrupted / "config.json").read_text(encoding="utf-8")
    path = interrupted / "config.json"
    path.write_text(config.replace('"lr": 0.003', '"lr": NaN'), encoding="utf-8")
    _refused(command("train", "--resume", interrupted), "config.json must describe a run", "lr must be", "nan")
    path.write_text(config[: len(config) // 2], encoding="utf-8")
    _refused(command("generate", interrupted), "config.json must be JSON")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--temperature", "nan"], "--temperature must"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "nan"], "--top-p must"),
        (["--top-k", "0"], "--top-k must"),
        (["--max-new-tokens", "0"], "--max-new-tokens must"),
        (["--seed", str(2**80)], "--seed must"),
        (["--prompt", ""], "prompt"),
        (["--stop", ""], "stop text"),
        (["--step", "3"], "Available: 2, 4"),
    ],
)
def test_a_bad_option_of_generate_is_refused(command, interrupted, options, part):
    _refused(command("generate", interrupted, *options), part)


def test_a_run_passed_as_an_argument_is_referred_to_resume(command, interrupted):
    _refused(command("train", interrupted), f"--resume {interrupted}")


def test_an_error_about_the_resumed_run_keeps_the_names_of_its_file(command, interrupted):
    path = interrupted / "config.json"
    config = path.read_text(encoding="utf-8")
    path.write_text(config.replace('"n_layers": 1', '"n_layers": 1000000'), encoding="utf-8")
    outcome = command("train", "--resume", interrupted)
    _refused(outcome, "config.json: n_layers must be")
    assert "--layers" not in outcome.err


def test_a_run_without_a_checkpoint_cannot_generate(command, interrupted):
    shutil.rmtree(interrupted / "checkpoints")
    _refused(command("generate", interrupted), f"{interrupted} has no checkpoint")


@contextlib.contextmanager
def _small_disk(folder):
    """A folder for about 400 kB: a file system of that size, or if none may be mounted, files of limited size."""
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


def test_training_on_a_full_disk_keeps_what_is_complete_and_can_be_resumed(command, small, tmp_path):
    """Checkpoints of 80 kB, all of them kept, until the disk is full; with more space the run can be resumed."""
    disk, later = tmp_path / "disk", tmp_path / "later"
    with _small_disk(disk):
        (disk / "filler").write_bytes(b"x" * 50_000)
        arguments = ["train", *small, "--out", disk / "run", "--checkpoint-every", 1, "--keep-checkpoints", 9]
        code, _, err = command(*arguments, "--steps", 8)
        assert code == 2
        assert err.count("\n") == 1
        assert "No space left on device" in err or "File too large" in err
        steps = list_checkpoints(disk / "run" / "checkpoints")
        names = {name.split("/")[0] for name in tree(disk / "run")}
        assert not [name for name in tree(disk / "run") if ".tmp-" in name]
        assert names <= {".lock", "config.json", "record.jsonl", "checkpoints"}
        subprocess.run(["cp", "-r", str(disk / "run"), str(later)], check=True)
    assert len(steps) < 8
    code, _, err = command("train", "--resume", later)
    assert (code, err) == (0, "")
    assert list_checkpoints(later / "checkpoints") == list(range(1, 9))


def test_a_disk_that_is_full_from_the_start_is_left_empty(command, small, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, earlier[1]))
    try:
        outcome = command("train", *small, "--out", disk / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    _refused(outcome, "File too large", "ulimit")
    assert list(disk.iterdir()) == []


def test_any_text_is_accepted_as_a_prompt(command, interrupted):
    outcome = command("generate", interrupted, "--prompt", "漢字 \x1b[2J " + SENTENCE * 3, "--max-new-tokens", 2)
    assert outcome.code == 0
    assert "\x1b" not in outcome.out
