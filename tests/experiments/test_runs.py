"""Creating, opening, resuming and extending runs."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.cli import SENTENCE

from omninorm.errors import ConfigError, DataError, MissingExtraError, RunError
from omninorm.experiments import (
    BpeTokenizer,
    Plan,
    build_model,
    create_run,
    is_finished,
    learning_rate,
    list_checkpoints,
    load_run,
    open_run,
    read_plan,
    read_record,
    run_folder,
    train,
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
    with pytest.raises(RunError, match="new or an empty folder"):
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


def test_a_run_with_a_damaged_last_checkpoint_is_not_finished(finished):
    path, _ = finished
    (path / "checkpoints" / "step-6" / "model.safetensors").write_bytes(b"half")
    assert not is_finished(path)
    with pytest.raises(RunError, match=r"step-6.*elete .*step-6 to go back to step-4"):
        open_run(path)


@pytest.mark.parametrize("module", ["safetensors.torch", "numpy"])
def test_a_package_missing_for_checkpoints_is_reported_first(finished, plan, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for use in (
        lambda: create_run(plan, tmp_path / "new"),
        lambda: open_run(finished[0]),
        lambda: load_run(finished[0]),
    ):
        with pytest.raises(MissingExtraError, match=f"the package {module.split('.')[0]}"):
            use()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("section", ["model", "train", "tokenizer", "data", "versions"])
@pytest.mark.parametrize("value", ["nan", None, 3, [1], {"surprise": []}])
def test_a_config_with_a_section_of_another_type_is_refused(finished, section, value):
    path, _ = finished
    _change(path, section, value)
    if (section, value) == ("versions", {"surprise": []}):
        with open_run(path) as run:
            assert "torch None" in run.notices[1]
        return
    for use in (read_plan, open_run, load_run):
        with pytest.raises(RunError, match=r"config\.json must describe a run"):
            use(path)


def test_a_text_that_is_not_a_path_is_refused(finished):
    path, _ = finished
    _change(path, "data", {"text": 5, "held_out": 0.1})
    with pytest.raises(RunError, match=r"config\.json must describe a run, got a text of type int"):
        open_run(path)


def test_another_tokenizer_than_the_model_s_is_refused(plan, tmp_path):
    path = tmp_path / "bpe"
    with create_run(replace(plan, tokenizer="bpe", vocab_size=280), path) as run:
        run.train()
    assert load_run(path)[1].vocab_size == 280
    (path / "tokenizer.json").write_text(BpeTokenizer.train(SENTENCE.encode(), 270).to_json(), encoding="utf-8")
    for use in (load_run, open_run):
        with pytest.raises(RunError, match=r"tokenizer\.json has changed"):
            use(path)
    _change(path, "tokenizer", {"tokenizer": "bpe", "vocab_size": 280})  # as runs were once written
    for use in (load_run, open_run):
        with pytest.raises(RunError, match="280 tokens of the model, got 270"):
            use(path)


def test_a_text_that_has_moved_is_named(finished, text_file):
    text_file.unlink()
    with pytest.raises(DataError, match=r"No such file.*--text"):
        open_run(finished[0])
    with pytest.raises(DataError, match="must not be empty"):
        open_run(finished[0], text="")


@pytest.mark.parametrize("d_model", [10**7, 10**15, 10**19])
def test_a_model_that_does_not_fit_in_memory_is_refused(d_model):
    with pytest.raises(ConfigError, match=f"must fit in memory, got d_model={d_model}, "):
        build_model(replace(SHAPE, d_model=d_model, n_heads=d_model // 2, vocab_size=2), 0)


def test_a_model_is_refused_by_its_size_before_it_is_built(monkeypatch):
    """Linux grants memory that it does not have, and kills the process when it is used."""
    monkeypatch.setattr("omninorm.experiments.runs.Thinker", None)
    for size in (10_001, 10**23):
        with pytest.raises(ConfigError, match="n_layers must be at most 10,000") as caught:
            build_model(replace(SHAPE, n_layers=size), 0)
        assert caught.value.received == str(size)
    monkeypatch.setattr("omninorm.experiments.memory.memory_limit", lambda: 10**9)
    with pytest.raises(ConfigError, match="must fit in memory") as caught:
        build_model(replace(SHAPE, d_model=8192, n_heads=1, n_layers=1), 0)
    assert "d_model=8192" in caught.value.received
    assert "n_layers=1," in caught.value.received


def test_skipped_files_are_recorded_in_few_lines(plan, tmp_path):
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


def _result(path):
    """Return the newest checkpoint's files and the record without its clock."""
    newest = path / "checkpoints" / f"step-{list_checkpoints(path / 'checkpoints')[-1]}"
    record = [{k: v for k, v in event.items() if k != "clock"} for event in read_record(path / "record.jsonl")]
    return {file.name: file.read_bytes() for file in newest.iterdir()}, record


def _interrupted(plan, path):
    """A run that a signal has stopped after step 2."""
    with create_run(plan, path) as run:
        asked = iter([None, 15])
        train(run.model, run.data, run.plan.train, run=run.folder, stopped_by=lambda: next(asked))
    return path


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_that_is_extended_before_a_step_of_the_old_length_continues_bit_identically(plan, tmp_path, schedule):
    """With a constant schedule an extended run equals one of the larger number of steps from the start. With the cosine
    it follows the longer cosine from the step on at which it was extended."""
    settings = {"schedule": schedule, "warmup_steps": 2, "eval_every": 4, "checkpoint_every": 4}
    longer = plan.change(**settings, steps=8)
    path = _interrupted(plan.change(**settings, steps=4), tmp_path / "extended")
    with open_run(path, steps=8) as run:
        assert run.plan == longer.change(precision="float32")
        assert "from 4 to 8 steps: from step 3 on" in run.notices[-1]
        assert run.train().status == "finished"
    with create_run(longer, tmp_path / "straight") as run:
        run.train()
    extended, straight = _result(path), _result(tmp_path / "straight")
    if schedule == "constant":
        assert extended == straight
    steps = [event for event in extended[1] if event["kind"] == "step"]
    expected = [*(learning_rate(step, replace(longer.train, steps=4)) for step in (1, 2)),
                *(learning_rate(step, longer.train) for step in range(3, 9))]  # fmt: skip
    assert [event["lr"] for event in steps] == expected


def test_an_extended_run_that_is_interrupted_continues_bit_identically(finished, tmp_path):
    path, _ = finished
    twin = tmp_path / "twin"
    shutil.copytree(path, twin)
    with open_run(path, steps=11) as run:
        assert run.train().status == "finished"
    with open_run(twin, steps=11):
        pass  # as if it had been killed before its first step
    assert not is_finished(twin)
    with open_run(twin) as run:
        asked = iter([None, 15])
        train(run.model, run.data, run.plan.train, run=run.folder, stopped_by=lambda: next(asked))
    with open_run(twin) as run:
        run.train()
    assert _result(path) == _result(twin)
    assert is_finished(path)
    assert is_finished(twin)
    assert [event["step"] for event in read_record(path / "record.jsonl") if event["kind"] == "step"] == [*range(1, 12)]


def test_the_config_of_an_extended_run_keeps_its_history(finished):
    path, _ = finished
    before = json.loads((path / "config.json").read_text())
    for steps in (8, 8, 9):
        with open_run(path, steps=steps, command=["again"]):
            pass
    config = json.loads((path / "config.json").read_text())
    assert [(entry["from"], entry["to"], entry["at_step"]) for entry in config["extended"]] == [(6, 8, 6), (8, 9, 6)]
    assert config["extended"][0]["command"] == ["again"]
    # The warm-up of the shorter run, whose default depends on the number of steps, is kept.
    assert config["train"] == {**before["train"], "steps": 9, "warmup_steps": read_plan(path).train.warmup}
    assert {**config, "train": 0, "extended": 0} == {**before, "train": 0, "extended": 0}
    assert not list(path.glob(".tmp-*"))


def test_a_run_is_not_shortened_below_its_newest_checkpoint_or_its_warmup(finished, plan, tmp_path):
    path, _ = finished
    warm = _interrupted(plan.change(warmup_steps=4), tmp_path / "warm")  # after step 2 of 6
    for folder, steps, least in ((path, 5, 6), (warm, 1, 2), (warm, 3, 4)):
        before = (folder / "config.json").read_bytes()
        with pytest.raises(ConfigError) as error:
            open_run(folder, steps=steps)
        assert str(folder) in error.value.invariant
        assert f"{least} steps" in error.value.invariant
        assert error.value.received == f"steps={steps}"
        assert (folder / "config.json").read_bytes() == before
    with open_run(path):
        pass  # the folder was released


def test_an_extension_is_undone_before_a_step_is_trained(finished):
    path, losses = finished
    before = _result(path)
    with open_run(path, steps=10**12):
        pass  # as if it had been killed before its first step
    with pytest.raises(ConfigError, match="10¹² steps, got steps=99999999999999999999"):
        open_run(path, steps=99999999999999999999)
    with open_run(path, steps=6) as run:
        assert "from 1000000000000 to 6 steps" in run.notices[-1]
        result = run.train()
    assert (result.status, result.losses) == ("finished", losses)
    assert is_finished(path)
    assert _result(path) == before


def test_a_run_that_is_shortened_to_its_newest_checkpoint_is_evaluated_there(plan, tmp_path):
    path = _interrupted(plan.change(eval_every=4, warmup_steps=1), tmp_path / "run")
    with open_run(path, steps=2) as run:
        result = run.train()
    assert [event.step for event in result.eval_events] == [0, 2]
    assert is_finished(path)


def test_a_run_that_diverged_before_its_first_checkpoint_has_no_model(plan, tmp_path):
    with create_run(plan, tmp_path / "run") as run:
        run.folder.record.append({"kind": "diverged", "step": 1})
    with pytest.raises(RunError) as error:
        load_run(tmp_path / "run")
    assert "diverged" in error.value.invariant
    assert "learning rate" in error.value.remedy


def test_a_config_that_cannot_be_rewritten_is_unchanged_and_the_run_is_released(finished, monkeypatch):
    path, _ = finished
    before = (path / "config.json").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("omninorm.record.files.os.replace", fail)
    with pytest.raises(RunError, match="No space left"):
        open_run(path, steps=9)
    monkeypatch.undo()
    assert (path / "config.json").read_bytes() == before
    with open_run(path, steps=9):
        pass


def test_settings_are_flat_and_have_their_defaults_filled_in(plan):
    settings = plan.settings()
    assert (settings["d_model"], settings["normalization"], settings["lr"], settings["text"]) == (
        16, "rmsnorm", 0.003, plan.text,
    )  # fmt: skip
    assert (settings["n_kv_heads"], settings["head_dim"], settings["d_ff"], settings["warmup_steps"]) == (2, 8, 48, 0)
    assert plan.change(**{name: value for name, value in settings.items() if name != "norm"}).settings() == settings


def test_numpy_scalars_are_settings_that_serialize(plan, tmp_path):
    given = {
        "lr": np.float32(0.25),
        "weight_decay": np.float64(0.5),
        "steps": np.int64(1),
        "betas": (np.float32(0.5), 0.75),
    }
    changed = plan.change(**given)
    with create_run(changed, tmp_path / "run") as run:
        assert run.train().status == "finished"
    train = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert (train["lr"], train["weight_decay"], train["steps"], train["betas"]) == (0.25, 0.5, 1, [0.5, 0.75])
    assert read_plan(tmp_path / "run") == changed.change(precision="float32")
