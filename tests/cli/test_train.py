"""`omninorm train` from its options to what it leaves and says."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.cli import SENTENCE, SMALL, tree

from omninorm.experiments import list_checkpoints, read_plan, read_record


def test_a_run_says_what_it_did_and_how_to_go_on(command, small, tmp_path):
    run = tmp_path / "run"
    code, out, err = command("train", *small, "--out", run)
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'text.txt'}: 3,492 bytes to train on, 388 held out" in out
    assert "1 blocks of width 16" in out
    assert "step 0/4  held out 8." in out
    assert "step 4/4  held out" in out
    assert f"Written to {run}\n" in out
    assert out.endswith(f'Try it: omninorm generate {run} --prompt "In the beginning"\n')
    assert "\x1b" not in out
    assert list_checkpoints(run / "checkpoints") == [4]


def test_options_reach_the_run_and_its_config(command, small, tmp_path):
    run = tmp_path / "run"
    options = (
        "--norm layernorm --placement post --eps 1e-5 --kv-heads 1 --feed-forward gelu --d-ff 24 --untied-head "
        "--qk-norm --lr 0.01 --warmup-steps 1 --schedule constant --weight-decay 0 --betas 0.8 0.9 --no-grad-clip "
        "--grad-accumulation 2 --precision bf16 --seed 7 --eval-every 2 --checkpoint-every 2 --keep-checkpoints 1 "
        "--log-every 2 --held-out 0.2 --min-lr-ratio 0.5 --adam-eps 1e-6"
    )
    code, _, err = command("train", *small, "--out", run, *options.split())
    assert (code, err) == (0, "")
    plan = read_plan(run)
    norm = plan.model.norm
    assert (norm.normalization, norm.norm_placement, norm.norm_eps, norm.qk_norm) == ("layernorm", "post", 1e-5, True)
    model = plan.model
    assert (model.n_kv_heads, model.feed_forward, model.d_ff, model.tied_head) == (1, "gelu", 24, False)
    assert (model.max_seq_len, model.vocab_size) == (16, 256)
    train = plan.train
    assert (train.lr, train.warmup_steps, train.schedule, train.weight_decay) == (0.01, 1, "constant", 0.0)
    assert (train.betas, train.grad_clip, train.grad_accumulation) == ((0.8, 0.9), None, 2)
    assert (train.precision, train.seed, train.adam_eps, train.min_lr_ratio) == ("bf16", 7, 1e-6, 0.5)
    assert plan.held_out == 0.2
    assert [e["step"] for e in read_record(run / "record.jsonl") if e["kind"] == "step"] == [2, 4]
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert config["command"][:2] == ["omninorm", "train"]
    assert config["command"][-1] == "1e-6"
    assert config["threads"] == 1
    assert config["versions"]["torch"] == torch.__version__
    assert config["data"]["train_bytes"] + config["data"]["held_out_bytes"] == len(SENTENCE) * 40


def test_runs_are_numbered_by_default(command, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        code, out, _ = command("train", *small, "--steps", 1)
        assert code == 0
        assert f"Written to runs/text-{number}\n" in out


def test_a_folder_s_files_are_counted_and_what_is_left_out_is_named(command, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(SENTENCE * 20, encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    code, out, _ = command("train", "--text", folder, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    assert code == 0
    assert "2 files, " in out
    assert "left out: picture.png (a NUL at byte 4" in out


def test_a_run_that_diverges_says_so_and_exits_with_1(command, small, tmp_path):
    run = tmp_path / "run"
    code, out, err = command("train", *small, "--lr", 1e30, "--steps", 50, "--out", run, "--schedule", "constant")
    assert (code, err) == (1, "")
    assert "Diverged at step" in out
    assert [event["kind"] for event in read_record(run / "record.jsonl")][-1] == "diverged"
    code, _, err = command("train", "--resume", run)
    assert code == 2
    assert "only a run that has not diverged can go on" in err


def test_a_finished_run_is_left_alone(command, small, tmp_path):
    run = tmp_path / "run"
    command("train", *small, "--out", run)
    before = tree(run)
    code, out, _ = command("train", "--resume", run)
    assert code == 0
    assert f"The run in {run} is finished" in out
    assert tree(run) == before


@pytest.fixture
def unfinished(command, small, tmp_path):
    """A run that has lost its end: as if it had been killed after step 2."""
    run = tmp_path / "unfinished"
    assert command("train", *small, "--out", run, "--checkpoint-every", 2)[0] == 0
    lines = (run / "record.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "record.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["step"] <= 2), encoding="utf-8"
    )
    for file in (run / "checkpoints" / "step-4").iterdir():
        file.unlink()
    (run / "checkpoints" / "step-4").rmdir()
    return run


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--lr", "0.5"], "lr"),
        (["--steps", "9"], "steps"),
        (["--norm", "layernorm"], "normalization"),
        (["--seq-len", "8"], "seq len"),
        (["--tokenizer", "bpe"], "tokenizer"),
        (["--threads", "2"], "threads"),
        (["--out", "elsewhere"], "out"),
        (["--no-grad-clip"], "grad clip"),
    ],
)
def test_resuming_with_other_settings_is_refused(command, unfinished, options, name):
    before = tree(unfinished)
    code, _, err = command("train", "--resume", unfinished, *options)
    assert code == 2
    assert f"--resume goes on with the run's own settings, got another {name}, " in err
    assert tree(unfinished) == before


def test_resuming_with_the_same_settings_goes_on(command, unfinished, small):
    code, out, err = command("train", "--resume", unfinished, *small)
    assert (code, err) == (0, "")
    assert "step 4/4" in out
    assert [e["step"] for e in read_record(unfinished / "record.jsonl") if e["kind"] == "step"] == [1, 2, 3, 4]


def test_resuming_with_a_text_that_has_moved_or_changed(command, unfinished, text_file, tmp_path):
    moved = text_file.rename(tmp_path / "moved.txt")
    code, _, err = command("train", "--resume", unfinished)
    assert code == 2
    assert f"No such file or directory at {text_file}" in err
    other = tmp_path / "other.txt"
    other.write_text(SENTENCE * 39, encoding="utf-8")
    code, _, err = command("train", "--resume", unfinished, "--text", other)
    assert code == 2
    assert f"needs the text it was started with, got another one at {other}" in err
    assert command("train", "--resume", unfinished, "--text", moved)[0] == 0
