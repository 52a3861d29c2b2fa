"""Model factories of users: they are found and called, and refused if they ignore their arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omninorm import Block, NormConfig
from omninorm.errors import ConfigError
from omninorm.experiments.compare import Cell, parse_plan
from omninorm.experiments.compare.factory import build_cell, check_factory
from omninorm.experiments.compare.protocols import MEASURE
from omninorm.experiments.corpus import load_corpus
from omninorm.placement import FinalNorm, enter

HERE = __name__
WIDTH = 8


class Mixer(nn.Module):
    """Blocks of linear layers, unlike a Thinker."""

    def __init__(self, norm: NormConfig, depth: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = norm
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.blocks = nn.ModuleList(
            Block(norm, WIDTH, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), block=number, blocks=depth)
            for number in range(1, depth + 1)
        )
        self.final = FinalNorm(norm, WIDTH)
        self.head = nn.Linear(WIDTH, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = enter(self.norm, self.embedding(tokens))
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.final(stream))
        return logits


def ignores_norm(norm: NormConfig, depth: int, vocab_size: int) -> nn.Module:
    return Mixer(NormConfig(), depth, vocab_size)


def ignores_depth(norm: NormConfig, depth: int, vocab_size: int) -> nn.Module:
    return Mixer(norm, 2, vocab_size)


def fails(norm: NormConfig, depth: int, vocab_size: int) -> nn.Module:
    raise ValueError("no such model")


def fails_for_layer_norm(norm: NormConfig, depth: int, vocab_size: int) -> nn.Module:
    return fails(norm, depth, vocab_size) if norm.normalization == "layernorm" else Mixer(norm, depth, vocab_size)


def narrow(norm: NormConfig, depth: int, vocab_size: int) -> nn.Module:
    return Mixer(norm, depth, vocab_size - 1)


def no_logits(norm: NormConfig, depth: int, vocab_size: int) -> object:
    return lambda tokens: "logits"


def cells(function: str, **study: object) -> list[Cell]:
    settings = {"seq_len": 16, "batch_size": 2, "eval_bytes": 512, "steps": 5, "d_model": 64}
    plan = {"model": f"{HERE}:{function}", "studies": [{"name": "a", "settings": settings, "seeds": 1, **study}]}
    return list(parse_plan(plan, "here").cells().values())


GRID = {"protocol": "train", "normalization": ["rmsnorm", "layernorm"], "placement": ["pre", "post"], "depth": [1, 3]}


@pytest.mark.parametrize("function", ["Mixer", "fails_for_layer_norm"])
def test_a_factory_that_follows_its_arguments_passes(function: str) -> None:
    check_factory(f"{HERE}:{function}", cells(function, **GRID))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{HERE}:ignores_norm", "for layernorm, post, 4 blocks and layernorm, pre, 4 blocks"),
        (f"{HERE}:ignores_depth", "for layernorm, post, 4 blocks and layernorm, post, 1 block"),
        (f"{HERE}:fails", "ValueError: no such model"),
        (f"{HERE}:narrow", "got (1, 8, 255)"),
        (f"{HERE}:no_logits", "no_logits failed for"),
        (f"{HERE}:missing", "has no attribute 'missing'"),
        (f"{HERE}:WIDTH", "type int"),
        ("no_such_module:build", "No module named"),
        (HERE, "package.module:function"),
    ],
)
def test_an_invalid_factory_is_refused_with_the_reason(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_factory(name, cells("Mixer", **GRID))
    assert said in str(caught.value)


def test_placements_that_are_equal_at_one_block_are_accepted() -> None:
    """LayerNorm Scaling divides by √1 in block 1."""
    check_factory(f"{HERE}:Mixer", cells("Mixer", protocol="train", placement=["pre", "lns"], depth=[1]))


def test_weights_depend_only_on_the_seed() -> None:
    (cell,) = cells("Mixer", protocol="train", depth=[2])
    first, second = build_cell(cell), build_cell(cell)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = build_cell(Cell(**{**vars(cell), "seed": 1}))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_settings_of_the_thinker_are_left_out_for_another_model() -> None:
    """d_model does not apply to it, so runs that differ only in d_model are the same run."""
    (cell,) = cells("Mixer", protocol="train", depth=[2])
    assert "d_model" not in cell.settings
    assert cell.settings["steps"] == 5


@pytest.mark.parametrize("protocol", ["init", "ramp", "train", "speed"])
def test_every_protocol_measures_a_users_model(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omninorm.experiments.compare.protocols.speed.SECONDS", 0.01)
    (cell,) = cells("Mixer", protocol=protocol, depth=[2])
    measured = MEASURE[protocol](cell, load_corpus())
    assert measured.outcome
    assert measured.clock["seconds"] > 0
    if protocol == "init":
        assert len(measured.outcome["stream_rms"]) == 2
    if protocol == "speed":
        assert set(measured.clock["ratios"]) == {"norm", "norm, torch.nn", "step"}


def test_modules_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_small_model.py").write_text(f"from {HERE} import Mixer as build\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    check_factory("my_small_model:build", cells("Mixer", **GRID))
