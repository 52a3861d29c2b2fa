"""Checkpoints: complete, rotated, and verified before they are used."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from omninorm.errors import MissingExtraError, RunError
from omninorm.experiments import build_model, build_optimizer, list_checkpoints, load_checkpoint, save_checkpoint
from omninorm.thinker import ThinkerConfig

SHAPE = ThinkerConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=16)


def _trained(config, seed=0, steps=3):
    model = build_model(SHAPE, seed)
    optimizer = build_optimizer(model, config)
    for step in range(steps):
        tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(step))
        model(tokens).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _state(model, optimizer):
    moments = {f"{n}.{k}": v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}
    return {**{name: p.detach().clone() for name, p in model.named_parameters()}, **moments}


@pytest.fixture
def saved(tmp_path, small):
    """Two whole checkpoints, and what the second holds."""
    model, optimizer = _trained(small)
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 2, model, optimizer, keep=2)
    save_checkpoint(folder, 4, model, optimizer, keep=2)
    return folder, model, optimizer


def test_a_loaded_checkpoint_is_bit_identical(saved, small):
    folder, model, optimizer = saved
    torch.manual_seed(7)
    save_checkpoint(folder, 6, model, optimizer, keep=2)
    expected = torch.rand(3)
    twin = build_model(SHAPE, 5)
    fresh = build_optimizer(twin, small)
    load_checkpoint(folder, 6, twin, fresh)
    ours, theirs = _state(model, optimizer), _state(twin, fresh)
    assert len(ours) == 4 * len(list(model.parameters()))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(torch.rand(3), expected)


def test_momentum_of_muon_is_saved_and_loaded(tmp_path, small):
    muon = replace(small, optimizer="muon")
    model, optimizer = _trained(muon)
    save_checkpoint(tmp_path, 3, model, optimizer, keep=1)
    twin = build_model(SHAPE, 5)
    fresh = build_optimizer(twin, muon)
    load_checkpoint(tmp_path, 3, twin, fresh)
    ours, theirs = _state(model, optimizer), _state(twin, fresh)
    assert sum(name.endswith(".momentum_buffer") for name in ours) == 7  # query, key, value, output; gate, up, down
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(RunError, match="must have the tensors of this model"):
        load_checkpoint(tmp_path, 3, twin, build_optimizer(twin, small))


def test_only_the_newest_checkpoints_are_kept(saved):
    folder, model, optimizer = saved
    for step in (6, 100):
        save_checkpoint(folder, step, model, optimizer, keep=3)
    assert list_checkpoints(folder) == [4, 6, 100]
    assert sorted(os.listdir(folder)) == ["step-100", "step-4", "step-6"]
    assert sorted(os.listdir(folder / "step-6")) == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_parameters_without_a_gradient_are_saved_and_loaded(tmp_path, small):
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    optimizer = build_optimizer(model, small)
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, 1, model, optimizer, keep=1)
    fresh = build_optimizer(model, small)
    load_checkpoint(tmp_path, 1, model, fresh)
    assert len(fresh.state) == 2


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path, small):
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    save_checkpoint(tmp_path, 1, model, build_optimizer(model, small), keep=1)
    assert list(load_file(tmp_path / "step-1" / "model.safetensors")) == ["embedding.weight"]
    expected = model["head"].weight.detach().clone()
    model["head"].weight.data.zero_()
    load_checkpoint(tmp_path, 1, model)
    assert torch.equal(model["head"].weight, expected)


def _truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 7)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [_truncate, _flip, os.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_and_the_older_checkpoint_are_named(saved, small, name, damage):
    folder, _, _ = saved
    damage(folder / "step-4" / name)
    twin = build_model(SHAPE, 5)
    before = {key: p.detach().clone() for key, p in twin.named_parameters()}
    with pytest.raises(RunError) as caught:
        load_checkpoint(folder, 4, twin, build_optimizer(twin, small))
    message = str(caught.value)
    assert str(folder / "step-4" / name) in message
    assert f"elete {folder / 'step-4'} to go back to step-2" in message
    assert all(torch.equal(before[key], p) for key, p in twin.named_parameters())


def test_a_damaged_older_checkpoint_is_not_recommended(saved, small):
    folder, model, optimizer = saved
    _truncate(folder / "step-2" / "model.safetensors")
    _truncate(folder / "step-4" / "optimizer.safetensors")
    with pytest.raises(RunError, match=r"estore .*step-4, or delete it to start from the first step"):
        load_checkpoint(folder, 4, model, optimizer)


def test_another_format_is_refused(saved):
    folder, model, _ = saved
    path = folder / "step-4" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))
    with pytest.raises(RunError, match="format 1 or 2, got format 9"):
        load_checkpoint(folder, 4, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 32}, r"must be \[256, 32\] float32 for this model, got \[256, 16\] float32"),
        ({"n_layers": 2}, r"got no 'blocks\.1\."),
        ({"tied_head": False}, r"got no 'head\.weight'"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, change, message):
    folder, _, _ = saved
    with pytest.raises(RunError, match=message):
        load_checkpoint(folder, 4, build_model(replace(SHAPE, **change), 0))


def test_a_checkpoint_of_another_dtype_is_refused(saved):
    folder, model, _ = saved
    with pytest.raises(RunError, match=r"must be \[256, 16\] bfloat16 for this model, got \[256, 16\] float32"):
        load_checkpoint(folder, 4, model.bfloat16())


def _replace(checkpoint, name, content):
    """Other content with the right size and digest, so that it is the content itself that must be refused."""
    (checkpoint / name).write_bytes(content)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_a_pickled_file_is_refused_and_not_opened(saved):
    folder, model, optimizer = saved
    pickled = io.BytesIO()
    torch.save(model.state_dict(), pickled)
    _replace(folder / "step-4", "model.safetensors", pickled.getvalue())
    with pytest.raises(RunError, match=r"model\.safetensors must be a safetensors file"):
        load_checkpoint(folder, 4, model, optimizer)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_of_another_format_is_refused_although_its_digest_is_right(saved, content):
    folder, model, optimizer = saved
    _replace(folder / "step-4", "model.safetensors", content)
    with pytest.raises(RunError, match=r"model\.safetensors must be a safetensors file.*elete .*step-2"):
        load_checkpoint(folder, 4, model, optimizer)


@pytest.mark.parametrize("name", ["step-02", "step-٣", "step-", "step--1", "step-2x"])
def test_a_folder_with_another_name_is_not_a_checkpoint(tmp_path, name):
    (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []


def test_the_folder_of_checkpoints_is_synced_once_when_it_is_created(tmp_path, small, monkeypatch):
    synced = []
    monkeypatch.setattr("omninorm.experiments.checkpoint.sync_folder", synced.append, raising=False)
    model, optimizer = _trained(small)
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, model, optimizer, keep=2)
    assert synced == [tmp_path]


@pytest.mark.parametrize(("module", "package"), [("safetensors.torch", "safetensors"), ("numpy", "numpy")])
def test_a_missing_package_is_named(saved, monkeypatch, module, package):
    folder, model, optimizer = saved
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"the package {package}.*\[train\]"):
        save_checkpoint(folder, 6, model, optimizer, keep=2)
