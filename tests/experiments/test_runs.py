"""From a plan to a folder, and from a folder back to a run that goes on."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
from helpers.cli import SENTENCE

from omninorm.errors import ConfigError, DataError, MissingExtraError, RunError
from omninorm.experiments import (
    BpeTokenizer,
    Plan,
    build_model,
    create_run,
    is_finished,
    list_checkpoints,
    load_run,
    open_run,
    read_plan,
    read_record,
    run_folder,
)
from omninorm.thinker import ThinkerConfig

SHAPE = ThinkerConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=16)


@pytest.fixture
def plan(text_file, small) -> Plan:
    return Plan(model=SHAPE, train=small, text=str(text_file))


@pytest.fixture
def finished(plan, tmp_path):
    """A finished run of 6 steps with checkpoints at 4 and 6, and its losses."""
    with create_run(plan, tmp_path / "run") as run:
        return tmp_path / "run", run.train().losses


def _change(path, section, value):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, section: value}))


def test_a_run_inside_its_own_text_can_be_resumed(plan, tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(SENTENCE * 40, encoding="utf-8")
    monkeypatch.chdir(folder)
    with create_run(replace(plan, text=".")) as run:
        run.train()
        path = run.folder.path
    assert str(path) == "runs/texts-1"
    shutil.rmtree(path / "checkpoints" / "step-6")
    with open_run(path) as run:
        assert run.train().status == "finished"


def test_two_runs_that_start_at_once_get_two_names(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with create_run(plan) as first:
        fresh = iter([first.folder.path])  # the name that was free when the second run looked
        choose = run_folder.fresh_folder
        monkeypatch.setattr("omninorm.experiments.runs.fresh_folder", lambda name: next(fresh, None) or choose(name))
        with create_run(plan) as second:
            assert [str(run.folder.path) for run in (first, second)] == ["runs/text-1", "runs/text-2"]


def test_a_chosen_folder_that_is_taken_is_refused(finished, plan):
    with pytest.raises(RunError, match="needs an empty or a new folder"):
        create_run(plan, finished[0])


def test_without_its_last_checkpoint_a_run_trains_the_missing_steps(finished):
    path, losses = finished
    assert is_finished(path)
    shutil.rmtree(path / "checkpoints" / "step-6")
    assert not is_finished(path)
    with open_run(path) as run:
        result = run.train()
    assert (result.status, result.losses) == ("finished", losses)
    assert is_finished(path)
    assert list_checkpoints(path / "checkpoints") == [4, 6]


def test_without_any_checkpoint_a_run_starts_from_the_first_step(finished):
    path, losses = finished
    before = [event["kind"] for event in read_record(path / "record.jsonl")]
    shutil.rmtree(path / "checkpoints")
    with open_run(path) as run:
        assert run.train().losses == losses
    assert [event["kind"] for event in read_record(path / "record.jsonl")] == before


def test_a_damaged_last_checkpoint_is_an_error_and_not_the_end(finished):
    path, _ = finished
    (path / "checkpoints" / "step-6" / "model.safetensors").write_bytes(b"half")
    assert not is_finished(path)
    with open_run(path) as run, pytest.raises(RunError, match=r"must be whole.*delete .*step-6 to go back to step-4"):
        run.train()


@pytest.mark.parametrize("module", ["safetensors.torch", "numpy"])
def test_what_checkpoints_need_is_missed_before_anything_is_done(finished, plan, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for use in (
        lambda: create_run(plan, tmp_path / "new"),
        lambda: open_run(finished[0]),
        lambda: load_run(finished[0]),
    ):
        with pytest.raises(MissingExtraError, match=f"without {module.split('.')[0]}"):
            use()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("section", ["model", "train", "tokenizer", "data", "versions"])
@pytest.mark.parametrize("value", ["nan", None, 3, [1], {"surprise": []}])
def test_a_config_of_another_shape_is_an_error(finished, section, value):
    path, _ = finished
    _change(path, section, value)
    if (section, value) == ("versions", {"surprise": []}):
        with open_run(path) as run:
            assert "torch was None when the run was started" in run.notices[1]
        return
    for use in (read_plan, open_run, load_run):
        with pytest.raises(RunError, match=r"config\.json must describe a run"):
            use(path)


def test_a_text_that_is_no_path_is_an_error(finished):
    path, _ = finished
    _change(path, "data", {"text": 5, "held_out": 0.1})
    with pytest.raises(RunError, match=r"config\.json must describe a run, got a text that is no path"):
        open_run(path)


def test_another_tokenizer_than_the_model_s_is_refused(plan, tmp_path):
    path = tmp_path / "bpe"
    with create_run(replace(plan, tokenizer="bpe", vocab_size=280), path) as run:
        run.train()
    assert load_run(path)[1].vocab_size == 280
    (path / "tokenizer.json").write_text(BpeTokenizer.train(SENTENCE.encode(), 270).to_json(), encoding="utf-8")
    for use in (load_run, open_run):
        with pytest.raises(RunError, match=r"tokenizer\.json must be what was written"):
            use(path)
    _change(path, "tokenizer", {"tokenizer": "bpe", "vocab_size": 280})  # as runs were once written
    for use in (load_run, open_run):
        with pytest.raises(RunError, match="same number of tokens, got 270 and 280"):
            use(path)


def test_a_text_that_has_moved_is_asked_for(finished, text_file):
    text_file.unlink()
    with pytest.raises(DataError, match=r"No such file.*or name where it is now \(--text\)"):
        open_run(finished[0])
    with pytest.raises(DataError, match="path must not be empty"):
        open_run(finished[0], text="")


@pytest.mark.parametrize("d_model", [10**7, 10**15, 10**19])
def test_a_model_that_does_not_fit_in_memory_is_refused(d_model):
    with pytest.raises(ConfigError, match=f"a model must fit in memory, got d_model={d_model}, "):
        build_model(replace(SHAPE, d_model=d_model, n_heads=d_model // 2, vocab_size=2), 0)


def test_what_was_left_out_is_recorded_in_few_lines(plan, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(SENTENCE * 40, encoding="utf-8")
    for number in range(25):
        (folder / f"picture-{number:02}.png").write_bytes(b"\0")
    with create_run(replace(plan, text=str(folder)), tmp_path / "run") as run:
        assert len(run.corpus.skipped) == 25
    skipped = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["skipped"]
    assert len(skipped) == 21
    assert skipped[-1] == "and 5 more"
