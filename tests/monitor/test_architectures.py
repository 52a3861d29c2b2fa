"""Blocks, chains, norms and placements of architectures of transformers, and their healthy training."""

from __future__ import annotations

import warnings

import pytest
from helpers.architectures import ARCHITECTURES
from helpers.watched_models import adamw

from omninorm.monitor import watch

# The judgment of small norm inputs and of first learning rates is tested with the rules.
OF_OTHERS = ("eps-share", "learning-rate", "no-progress")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_seen_as_it_is(name: str) -> None:
    build, loss_of, placement, chains = ARCHITECTURES[name]
    model = build()
    optimizer = adamw(model, lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("error", "omninorm.watch")
        with watch(model, optimizer, every=2) as watched:
            for step in range(1, 13):
                loss = loss_of(model, step)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                watched.step(loss)
    facts, signals = watched.history.facts, watched.history.samples[-1].signals
    assert [len(chain) for chain in facts.chains] == chains
    assert [at for chain in facts.chains for at in chain] == list(range(len(facts.blocks)))
    assert watched.history.placement == placement
    assert bool(watched.history.placement_reason) == (placement is None)
    assert all(value is not None for value in signals["stream_rms"])
    assert {norm.block for norm in facts.norms} >= set(range(len(facts.blocks)))
    measured = sum(value is not None for value in signals["norm_rms"])
    assert measured >= 0.8 * len(facts.norms)  # norms of parts that do not run are the exception
    assert [(alarm.rule, alarm.layer) for alarm in watched.alarms if alarm.rule not in OF_OTHERS] == []


@pytest.mark.slow
def test_routers_are_found() -> None:
    for name, router in (("Qwen3-MoE", "mlp.gate"), ("gpt-oss", "mlp.router"), ("DeepSeek-V3", "mlp.gate")):
        from omninorm.monitor.model_map.structure import find_structure

        structure = find_structure(ARCHITECTURES[name][0]())
        dense = {0} if name == "DeepSeek-V3" else set()
        for at, block in enumerate(structure.blocks):
            assert (block.router is None) == (at in dense)
            if block.router is not None:
                assert block.router[0] == f"{block.name}.{router}"
                assert block.feed_forward == f"{block.name}.mlp"
