"""Damaged run folders: each is read, or refused by an OmninormError, within limits of time and memory."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.cli import SENTENCE
from helpers.mutations import bounded, cases, mutated_bytes, mutated_json, refuses_or_reads

from omninorm.experiments import (
    Plan,
    TrainConfig,
    create_run,
    is_finished,
    load_checkpoint,
    load_run,
    open_run,
    read_plan,
)
from omninorm.thinker import Thinker, ThinkerConfig


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with BPE tokens; its text lies next to it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(SENTENCE * 6, encoding="utf-8")
    train = TrainConfig(steps=2, batch_size=1, seq_len=8, eval_bytes=32, checkpoint_every=1, watch_every=None)
    model = ThinkerConfig(d_model=8, n_layers=1, n_heads=1, max_seq_len=8)
    plan = Plan(model=model, train=train, text=str(folder / "text.txt"), tokenizer="bpe", vocab_size=258)
    with create_run(plan, folder / "run") as run:
        run.train()
    return folder / "run"


@pytest.fixture(scope="module")
def unstarted(finished):
    """A run without checkpoints, whose sizes nothing in its folder contradicts."""
    shutil.copytree(finished, finished.with_name("unstarted"), ignore=shutil.ignore_patterns("step-*"))
    return finished.with_name("unstarted")


def _open(path):
    is_finished(path)
    read_plan(path)
    with open_run(path):
        pass
    load_run(path)


def test_a_damaged_config_is_read_or_refused(finished):
    path = finished / "config.json"
    good = path.read_bytes()
    _open(finished)
    read = 0
    try:
        for case in range(cases(60)):
            path.write_bytes(mutated_json(json.loads(good), case))
            with bounded(path.stat().st_size):
                read += refuses_or_reads(_open, finished)
    finally:
        path.write_bytes(good)
    assert 0 < read < cases(60)


KEYS = ["d_model", "n_layers", "n_heads", "d_ff", "vocab_size", "max_seq_len", "head_dim"]


def _resized(config, key, size):
    """Return config.json with another size of the model."""
    train = {"seq_len": size} if key == "max_seq_len" else {}
    return json.dumps({**config, "model": {**config["model"], key: size}, "train": {**config["train"], **train}})


@pytest.mark.parametrize("key", KEYS)
def test_a_size_that_the_checkpoint_does_not_have_is_refused(finished, key):
    path = finished / "config.json"
    good = path.read_bytes()
    config = json.loads(good)
    try:
        for size in (0, 3, 10**5, 2**31, 2**63, 10**18, 10**23, -1, 1e18, "8", [8]):
            path.write_text(_resized(config, key, size))
            with bounded(0):
                # The weights do not depend on the longest context.
                possible = key == "max_seq_len" and type(size) is int and size > 0
                assert refuses_or_reads(load_run, finished) == possible
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("key", KEYS)
def test_a_size_that_is_too_large_to_build_is_refused(unstarted, key):
    path = unstarted / "config.json"
    good = path.read_bytes()
    read = []
    try:
        for size in (0, 3, 10**5, 2**31, 2**63, 10**18, 10**23):
            path.write_text(_resized(json.loads(good), key, size))
            with bounded(0):
                read += [size] if refuses_or_reads(lambda: open_run(unstarted).folder.close()) else []
    finally:
        path.write_bytes(good)
    possible = {"n_layers": [3], "d_ff": [3, 10**5], "head_dim": [10**5], "max_seq_len": [3]}
    assert read == possible.get(key, [])


def test_a_damaged_checkpoint_is_read_or_refused(finished, tmp_path):
    checkpoint = shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints") / "step-2"
    model = Thinker(read_plan(finished).model)
    load_checkpoint(checkpoint.parent, 2, model)
    good = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    # Format 2 has a folder of files for the optimizer.
    state = json.loads(good["state.json"])
    part = {"optimizer/shard.safetensors": state["files"]["optimizer.safetensors"]}
    sharded = {**state, "format": 2, "files": {"model.safetensors": state["files"]["model.safetensors"], **part}}
    read = 0
    for case in range(cases(100)):
        name = ("state.json", "state.json", "model.safetensors")[case % 3]
        damage = mutated_json([state, sharded][case % 2], case) if "json" in name else mutated_bytes(good[name], case)
        (checkpoint / name).write_bytes(damage)
        with bounded(len(damage)):
            read += refuses_or_reads(load_checkpoint, checkpoint.parent, 2, model)
        (checkpoint / name).write_bytes(good[name])
    assert 0 < read < cases(100)
