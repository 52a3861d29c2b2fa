"""`omninorm train`: from its options to its output, its files, and resumed and extended runs."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from helpers.cli import SENTENCE, SMALL, call, tree
from rich.console import Console

from omninorm.cli.progress import show_progress
from omninorm.experiments import Plan, list_checkpoints, open_run, read_plan, read_record
from omninorm.experiments.events import EvalEvent, StepEvent


def test_a_run_prints_its_result_and_the_next_command(command, small, tmp_path):
    run = tmp_path / "run"
    code, out, err = command("train", *small, "--out", run)
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'text.txt'}: 3,492 bytes to train on, 388 held out" in out
    assert "1 block of width 16" in out
    assert f"{run}, 1 thread\n" in out
    assert "step 0/4  held-out 8." in out
    assert "step 4/4  held-out" in out
    assert f"Output folder: {run}\n" in out
    # The prompt is the start of the text.
    assert out.endswith(f"  omninorm generate {run} --prompt 'In the beginning'\n")
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
    assert (train.precision, train.seed, train.adam_eps, train.min_lr_ratio) == ("bfloat16", 7, 1e-6, 0.5)
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
        assert f"Output folder: runs/text-{number}\n" in out


def test_the_files_of_a_folder_are_counted_and_skipped_ones_are_named(command, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(SENTENCE * 20, encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    code, out, _ = command("train", "--text", folder, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    assert code == 0
    assert "2 files, " in out
    assert "skipped: picture.png (a NUL at byte 4)" in out


def test_a_diverged_run_exits_with_1_and_cannot_be_resumed(command, small, tmp_path):
    run = tmp_path / "run"
    code, out, err = command("train", *small, "--lr", 1e30, "--steps", 50, "--out", run, "--schedule", "constant")
    assert (code, err) == (1, "")
    assert "Diverged at step" in out
    assert [event["kind"] for event in read_record(run / "record.jsonl")][-1] == "diverged"
    code, _, err = command("train", "--resume", run)
    assert code == 2
    assert f"{run} has diverged" in err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 4 steps with checkpoints of steps 2 and 4, its text, and the options of its command."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(SENTENCE * 40, encoding="utf-8")
    options = ["--text", str(folder / "text.txt"), *SMALL, "--steps", "4", "--checkpoint-every", "2"]
    assert call("train", *options, "--out", folder / "run") == 0
    return folder / "run", options


@pytest.fixture
def finished(trained, tmp_path):
    run = tmp_path / "finished"
    shutil.copytree(trained[0], run)
    return run


@pytest.fixture
def unfinished(trained, tmp_path):
    """A run without its end, as if it had been killed after step 2."""
    run = tmp_path / "unfinished"
    shutil.copytree(trained[0], run)
    lines = (run / "record.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 2]
    (run / "record.jsonl").write_text("".join(kept), encoding="utf-8")
    shutil.rmtree(run / "checkpoints" / "step-4")
    return run


def test_a_finished_run_is_unchanged_and_the_command_to_extend_it_is_printed(command, finished, trained):
    before = tree(finished)
    for options in ([], trained[1]):
        code, out, _ = command("train", "--resume", finished, *options)
        assert code == 0
        assert f"The run in {finished} is finished" in out
        assert "4 steps" in out
        assert f"omninorm train --resume {finished} --steps 8" in out
        assert tree(finished) == before


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_steps_extend_a_run(command, request, state):
    run = request.getfixturevalue(state)
    code, out, err = command("train", "--resume", run, "--steps", 7)
    assert (code, err) == (0, "")
    done = 4 if state == "finished" else 2
    assert f"extended from 4 to 7 steps: from step {done + 1} on, the learning rate follows the cosine schedule" in out
    assert "step 7/7" in out
    record = read_record(run / "record.jsonl")
    assert [event["step"] for event in record if event["kind"] == "step"] == list(range(1, 8))
    assert record[-1] == {"kind": "finished", "step": 7}
    assert read_plan(run).train.steps == 7
    assert list_checkpoints(run / "checkpoints")[-1] == 7
    code, out, _ = command("train", "--resume", run, "--steps", 7)
    assert (code, "is finished" in out) == (0, True)


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize(
    ("options", "flag", "theirs", "given"),
    [
        (["--lr", "0.5"], "--lr", "0.003", "--lr 0.5"),
        (["--steps", "1"], "--steps", " steps", "--steps 1"),
        (["--steps", "9", "--lr", "0.5"], "--lr", "0.003", "--lr 0.5"),
        (["--norm", "layernorm"], "--norm", "rmsnorm", "--norm layernorm"),
        (["--seq-len", "8"], "--seq-len", "16", "--seq-len 8"),
        (["--betas", "0.9", "0.9"], "--betas", "0.9 0.95", "--betas 0.9 0.9"),
        (["--tokenizer", "bpe"], "--tokenizer", "byte", "--tokenizer bpe"),
        (["--threads", "2"], "--threads", "1", "--threads 2"),
        (["--out", "elsewhere"], "--out", "finished", "--out elsewhere"),
        (["--untied-head"], "--untied-head", "which has --tied-head", ""),
        (["--no-grad-clip"], "--no-grad-clip", "--grad-clip 1.0", ""),
        (["--no-watch"], "--no-watch", "--watch-every 10", ""),
    ],
)
def test_an_option_that_conflicts_with_the_resumed_run_is_refused(
    command, request, state, options, flag, theirs, given
):
    run = request.getfixturevalue(state)
    before = tree(run)
    code, out, err = command("train", "--resume", run, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert flag in err
    assert theirs in err
    assert given in err
    assert tree(run) == before


def test_options_equal_to_the_settings_of_the_run_are_accepted(command, unfinished, trained):
    equal = [
        "--kv-heads",
        "2",
        "--head-dim",
        "8",
        "--d-ff",
        "48",
        "--warmup-steps",
        "0",
        "--vocab-size",
        "256",
        "--betas",
        "0.9",
        "0.95",
        "--eps",
        "1e-6",
    ]
    code, out, err = command("train", "--resume", unfinished, *trained[1], *equal, "--out", unfinished)
    assert (code, err) == (0, "")
    assert "step 4/4" in out
    assert [e["step"] for e in read_record(unfinished / "record.jsonl") if e["kind"] == "step"] == [1, 2, 3, 4]


def test_the_requested_vocabulary_is_accepted_although_the_text_gave_fewer_tokens(command, trained, tmp_path):
    options = [*trained[1], "--tokenizer", "bpe", "--seq-len", "8"]
    for number, requested in enumerate(([], ["--vocab-size", "5000"])):
        run = tmp_path / str(number)
        assert command("train", *options, *requested, "--out", run).code == 0
        assert 257 < read_plan(run).model.vocab_size < 1024
        resumed = command("train", "--resume", run, *options, *(requested or ["--vocab-size", "1024"]))
        assert (resumed.code, resumed.err) == (0, "")
    assert command("train", "--resume", run, "--vocab-size", "4999").code == 2


def test_the_text_of_a_finished_run_is_checked(command, finished, tmp_path):
    (tmp_path / "other.txt").write_text(SENTENCE * 39, encoding="utf-8")
    for text in ("nowhere.txt", "other.txt"):
        code, out, err = command("train", "--resume", finished, "--text", tmp_path / text)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert str(tmp_path / text) in err


def test_an_extension_is_undone_with_the_earlier_steps(command, finished):
    with open_run(finished, steps=9):
        pass  # as if it had been killed before its first step
    code, out, err = command("train", "--resume", finished, "--steps", 4)
    assert (code, err) == (0, "")
    assert "shortened from 9 to 4 steps, all of which are done" in out
    assert command("train", "--resume", finished, "--steps", 10**20).code == 2


def test_a_moved_text_is_accepted_and_a_changed_one_is_refused(command, unfinished, tmp_path):
    config = json.loads((unfinished / "config.json").read_text(encoding="utf-8"))
    moved, absent = config["data"]["text"], str(tmp_path / "absent.txt")
    config["data"]["text"] = absent
    (unfinished / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, _, err = command("train", "--resume", unfinished)
    assert code == 2
    assert absent in err
    assert "--text" in err
    other = tmp_path / "other.txt"
    other.write_text(SENTENCE * 39, encoding="utf-8")
    code, _, err = command("train", "--resume", unfinished, "--text", other)
    assert code == 2
    assert f"{other} is not the text" in err
    assert command("train", "--resume", unfinished, "--text", moved)[0] == 0


def test_the_bar_names_both_units_within_80_columns(monkeypatch):
    class Ends:
        """A run that ends during its training, after one evaluation and one step."""

        plan = Plan()

        def train(self, listener):
            listener(EvalEvent(step=0, bits_per_byte=8.0, seconds=1.0))
            listener(StepEvent(step=300, loss=2.5, grad_norm=1.0, lr=1e-3, seconds=1.0, tokens_per_second=12345.0))

    screen = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr("omninorm.cli.progress.console", lambda: screen)
    show_progress(Ends())
    last = screen.file.getvalue().split("\r")[-1]
    assert "300/600 loss 2.50 nats/token  12,345 tok/s  eval 8.00 bits/byte " in last
    assert "…" not in last
