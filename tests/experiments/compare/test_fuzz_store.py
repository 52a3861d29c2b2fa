"""Fuzzing of a comparison's stored runs: a damaged file is reported by name, set aside, and its run repeated."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.mutations import bounded, cases, mutated_json

from omninorm.errors import OmninormError, RunError
from omninorm.experiments.compare import Cell, ComparePlan, Measurement, parse_plan
from omninorm.experiments.compare.results import collect, collect_timings
from omninorm.experiments.compare.store import Store
from omninorm.experiments.corpus import Corpus, load_corpus

OUTCOMES: dict[str, Mapping[str, Any]] = {
    "train": {
        "status": "finished", "bits_per_byte": 3.5, "initial_bits": 8.0, "score": 3.5, "diverged_at": None,
        "largest_grad_norm": 2.0, "spike_score": 0.0, "losses": [8.0, 5.0, 3.5], "undo": {"best": 0.01, "learned": 0.3},
    },
    "ramp": {"largest_rate": 0.01, "sign": "spike", "last_good_step": 2, "losses": [8.0, 5.0, None]},
    "init": {"loss": 5.5, "stream_rms": [1.0, 2.0], "grad_norms": [0.5, 0.25], "growth": 0.69},
    "speed": {"operations": {"rmsnorm": {"per_element": 4.0, "per_row": 3.0}, "layernorm": {"per_element": 8.0}}},
}  # fmt: skip
CLOCK = {"seconds": 2.0, "ratios": {"norm": 1.3, "step": 1.0}}


def tiny_plan() -> ComparePlan:
    """One study per protocol, and the claims that read each."""
    grids: dict[str, dict[str, Any]] = {
        "norms": {"protocol": "train", "normalization": ["rmsnorm", "layernorm"]},
        "depths": {"protocol": "train", "placement": ["pre", "post"]},
        "qk-norm": {"protocol": "train", "vary": {"qk_norm": [False, True]}},
        "slow-ramp": {"protocol": "ramp", "placement": ["post", "deepnorm"]},
        "gradients": {"protocol": "init", "placement": ["pre", "post"], "depth": [2, 4]},
        "without-norms-start": {
            "protocol": "init", "normalization": ["none"], "placement": ["none"], "vary": {"init": ["xavier", "normal"]},
        },
        "stream": {"protocol": "init", "placement": ["pre", "lns"]},
        "speed": {"protocol": "speed"},
    }  # fmt: skip
    studies = [{"name": name, "depth": [2], "seeds": 2, **grid} for name, grid in grids.items()]
    return parse_plan(
        {"studies": studies, "claims": ["C1", "C2", "C3", "C6", "C7", "Xiong", "KEEL", "qk-norm", "lns"]}, ""
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("In the beginning God created the heaven and the earth. " * 60)
    return load_corpus(str(path))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ComparePlan]:
    plan = tiny_plan()
    store = Store.create(tmp_path_factory.mktemp("comparison") / "run", plan)
    for cell in plan.cells().values():
        store.save(cell, Measurement(outcome_of(cell), CLOCK))
    return store, plan


def outcome_of(cell: Cell) -> Mapping[str, Any]:
    """The stored outcome of a cell, with as many blocks as the cell has."""
    outcome = dict(OUTCOMES[cell.protocol])
    for name in ("stream_rms", "grad_norms"):
        if name in outcome:
            outcome[name] = [value / 2 ** (cell.seed + block) for block in range(cell.depth) for value in [1.0]]
    return outcome


def test_intact_files_give_results(comparison: tuple[Store, ComparePlan], corpus: Corpus) -> None:
    """Otherwise the fuzzing below would only damage files that are refused anyway."""
    store, plan = comparison
    assert store.damaged(plan.cells().values()) == []
    assert len(collect(plan, store, corpus)["studies"]) == 7
    assert [card["id"] for card in collect_timings(plan, store)["claims"]] == ["C2"]


def test_damaged_runs_are_named_or_harmless(comparison: tuple[Store, ComparePlan], corpus: Corpus) -> None:
    store, plan = comparison
    cells = list({cell.protocol: cell for cell in plan.cells().values()}.values())
    cells += [cell for cell in plan.cells().values() if cell.norm.norm_placement == "lns"]
    refused = 0
    for case in range(cases(48)):
        cell = cells[case % len(cells)]
        folder = ("cells", "cells", "clock")[case // len(cells) % 3]
        path = store.path / folder / f"{cell.id}.json"
        good = path.read_bytes()
        try:
            path.write_bytes(mutated_json(json.loads(good), case))
            with bounded(path.stat().st_size):
                faults = store.damaged([cell])
                if not faults:
                    results_are_json(lambda: collect(plan, store, corpus))
                    results_are_json(lambda: collect_timings(plan, store))
                else:
                    refused += 1
                    assert [each.path for each in faults] == [path]
                    assert str(path) in faults[0].fault
                    assert len(faults[0].fault) < 600
        finally:
            path.write_bytes(good)
    assert cases(48) / 4 < refused < cases(48)


def test_unknown_number_of_a_clock_that_is_not_finite_becomes_null(comparison: tuple[Store, ComparePlan]) -> None:
    store, plan = comparison
    cell = next(iter(plan.cells().values()))
    path = store.path / "clock" / f"{cell.id}.json"
    good = path.read_bytes()
    try:
        path.write_text('{"seconds": 1.0, "device": NaN}')
        assert collect_timings(plan, store)["cells"][cell.id] == {"seconds": 1.0, "device": None}
    finally:
        path.write_bytes(good)


def results_are_json(read: Callable[[], dict[str, Any]]) -> None:
    json.dumps(read(), allow_nan=False)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("cells", "{}"),
        ("cells", "[]"),
        ("cells", '{"outcome": 3}'),
        ("cells", "[" * 100_000),
        ("clock", "3"),
        ("clock", '{"seconds": "long"}'),
        ("failed", '{"why": 3}'),
    ],
)
def test_a_damaged_file_is_named_and_set_aside_alone(tmp_path: Path, kind: str, content: str) -> None:
    plan = parse_plan({"studies": [{"name": "a", "protocol": "train", "depth": [1], "seeds": 2}]}, "here")
    store = Store.create(tmp_path / "run", plan)
    damaged, intact = plan.cells().values()
    for cell in (damaged, intact):
        store.save(cell, Measurement(outcome_of(cell), CLOCK))
    path = store.path / kind / f"{damaged.id}.json"
    path.write_text(content)
    (found,) = store.damaged([damaged, intact])
    assert (found.cell, found.path, found.costs_run) == (damaged.id, path, kind != "failed")
    with pytest.raises(RunError, match="is damaged") as caught:
        {"cells": store.outcome, "clock": store.clock, "failed": lambda _: store.failures()}[kind](damaged)
    assert str(path) in caught.value.invariant
    assert "--resume" in caught.value.remedy
    store.set_aside([damaged, intact])
    assert store.damaged([damaged, intact]) == []
    assert store.done() == ({intact.id} if kind == "cells" else {damaged.id, intact.id})
    assert store.failures() == {}
    assert [file.name for file in (store.path / "damaged").iterdir()] == [f"{kind}-{damaged.id}.json"]
    assert (store.path / "damaged" / f"{kind}-{damaged.id}.json").read_text() == content


@pytest.mark.parametrize(
    ("protocol", "change", "place"),
    [
        ("train", {"score": "3.5"}, "score"),
        ("train", {"score": 10**400}, "score"),
        ("train", {"losses": [1.0, "2"]}, "losses.1"),
        ("train", {"losses": [1e300]}, "losses.0"),
        ("train", {"undo": {"best": 1.0}}, "undo.learned"),
        ("ramp", {"largest_rate": -1.0}, "largest_rate"),
        ("init", {"stream_rms": []}, "stream_rms"),
        ("init", {"stream_rms": [1.0]}, "stream_rms: 1 blocks of 4"),
        ("speed", {"operations": {"layernorm": {"per_element": 8.0}}}, "operations.rmsnorm"),
        ("speed", {"operations": {"layernorm": {"per_element": 0}}}, "operations.layernorm.per_element"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, protocol: str, change: dict[str, Any], place: str) -> None:
    plan = parse_plan({"studies": [{"name": "a", "protocol": protocol, "seeds": 1}]}, "here")
    store = Store.create(tmp_path / "run", plan)
    (cell,) = plan.cells().values()
    store.save(cell, Measurement({**outcome_of(cell), **change}, {}))
    with pytest.raises(RunError) as caught:
        store.outcome(cell)
    assert f"outcome.{place}" in caught.value.invariant


def test_the_outcome_of_another_run_is_refused(tmp_path: Path) -> None:
    plan = parse_plan({"studies": [{"name": "a", "protocol": "train", "seeds": 2}]}, "here")
    store = Store.create(tmp_path / "run", plan)
    one, other = plan.cells().values()
    store.save(one, Measurement(outcome_of(one), CLOCK))
    (store.path / "cells" / f"{one.id}.json").rename(store.path / "cells" / f"{other.id}.json")
    with pytest.raises(OmninormError, match="another run"):
        store.outcome(other)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("kind", ["cells", "clock", "failed"])
def test_a_file_that_can_not_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    """Otherwise a full table of open files would move every result away."""
    store, cell = one_run(tmp_path)
    path = store.path / kind / f"{cell.id}.json"
    read = Path.read_bytes

    def fails(file: Path) -> bytes:
        if file == path:
            raise OSError(number, os.strerror(number), str(file))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", fails)
    for use in (store.damaged, store.set_aside):
        with pytest.raises(RunError) as caught:
            use([cell])
        assert str(path) in caught.value.invariant
        assert os.strerror(number) in caught.value.invariant
    assert not (store.path / "damaged").exists()
    assert store.done() == {cell.id}


def test_a_folder_that_can_not_be_listed_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every run would be repeated."""
    store, _ = one_run(tmp_path)

    def fails(*_: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", fails)
    for use in (store.done, store.failures):
        with pytest.raises(RunError, match="Permission denied"):
            use()


@pytest.mark.parametrize("place", ["cell", "norm"])
@pytest.mark.parametrize("version", ["older", "newer"])
def test_runs_of_versions_with_more_or_fewer_settings_are_read(tmp_path: Path, place: str, version: str) -> None:
    store, cell = one_run(tmp_path)
    path = store.path / "cells" / f"{cell.id}.json"
    content = json.loads(path.read_text())
    values = content["cell"] if place == "cell" else content["cell"]["norm"]
    if version == "newer":
        values["fancy"] = 3
    else:
        del values["model" if place == "cell" else next(iter(values))]
    path.write_text(json.dumps(content))
    assert store.damaged([cell]) == []
    values |= {"seed": 99} if place == "cell" else {"norm_placement": "post"}
    path.write_text(json.dumps(content))
    assert [each.path for each in store.damaged([cell])] == [path]


def one_run(folder: Path) -> tuple[Store, Cell]:
    """A comparison with one run, which is done."""
    plan = parse_plan({"studies": [{"name": "a", "protocol": "train", "depth": [1], "seeds": 1}]}, "here")
    store = Store.create(folder / "run", plan)
    (cell,) = plan.cells().values()
    store.save(cell, Measurement(outcome_of(cell), CLOCK))
    return store, cell
