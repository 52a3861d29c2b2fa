"""The engine with real worker processes: order does not matter, failures are kept, nothing is run twice."""

import datetime
import json
import math
from pathlib import Path

import pytest

from omninorm.errors import ConfigError, RunError
from omninorm.experiments.compare import ComparePlan, parse_plan
from omninorm.experiments.compare.engine import Engine
from omninorm.experiments.compare.estimate import estimate_seconds, longest_first
from omninorm.experiments.compare.results import collect, collect_timings, table, write
from omninorm.experiments.compare.store import Store, to_json
from omninorm.experiments.corpus import load_corpus

TINY = {"d_model": 16, "n_heads": 2, "seq_len": 16, "batch_size": 2, "eval_bytes": 256, "steps": 3}


def plan(text: Path, **study: object) -> ComparePlan:
    base = {"name": "a", "protocol": "train", "depth": [1], "seeds": 2, "settings": TINY}
    return parse_plan({"studies": [{**base, **study}], "text": str(text)}, "here")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("In the beginning God created the heaven and the earth. " * 60)
    return path


def done_in(folder: Path, chosen: ComparePlan, workers: int, backwards: bool = False, limit: float = 120.0) -> Store:
    store = Store.create(folder, chosen)
    cells = list(chosen.cells().values())
    Engine(store, workers, limit).run(cells[::-1] if backwards else cells, lambda *_: True)
    return store


def test_results_do_not_depend_on_order_or_workers(tmp_path: Path, text: Path) -> None:
    chosen, corpus = plan(text, normalization=["rmsnorm", "layernorm"]), load_corpus(str(text))
    found = []
    for name, workers, backwards in (("one", 1, False), ("two", 2, True)):
        store = done_in(tmp_path / name, chosen, workers, backwards)
        results = collect(chosen, store, corpus)
        write(store, results, collect_timings(chosen, store))
        found.append((tmp_path / name / "results.json").read_bytes())
        assert set(json.loads((tmp_path / name / "timings.json").read_text())["cells"]) == set(chosen.cells())
    assert found[0] == found[1]
    assert str(tmp_path).encode() not in found[0]
    (comparison,) = json.loads(found[0])["studies"][0]["comparisons"]
    assert comparison["seeds"] == 2
    assert comparison["label"] == "layernorm pre"
    rows = table(json.loads(found[0])).splitlines()
    assert len(rows) == 1 + 4
    assert rows[1].startswith("a,train,1,rmsnorm pre,0.003,0,")


def test_a_configuration_stands_at_its_best_rate(tmp_path: Path, text: Path) -> None:
    corpus = load_corpus(str(text))
    for protocol, lower in (("train", True), ("ramp", False)):
        chosen = plan(text, protocol=protocol, lr=[1e-6, 0.02], settings={**TINY, "steps": 30})
        store = done_in(tmp_path / protocol, chosen, 2)
        (row,) = collect(chosen, store, corpus)["studies"][0]["configurations"]
        name = "score" if lower else "largest_rate"
        means = {}
        for cell in chosen.cells().values():
            means[cell.lr] = means.get(cell.lr, 0) + store.outcome(cell)[name] / 2
        assert row["lr"] == (min if lower else max)(means, key=means.get) == 0.02
        if lower:
            assert row["sensitivity"] == pytest.approx((means[1e-6] - means[0.02]) / 2)


def test_a_failure_is_kept_and_the_others_go_on(tmp_path: Path, text: Path) -> None:
    """Held-out text that is shorter than a window: the run fails, twice, in words."""
    chosen = plan(text, vary={"seq_len": [16, 4000]}, seeds=1)
    store = done_in(tmp_path / "c", chosen, 2)
    (why,) = store.failures().values()
    assert "at least seq_len + 1 = 4001 tokens" in why
    assert len(store.done()) == 1
    results = collect(chosen, store, load_corpus(str(text)))
    assert results["failures"] == store.failures()
    assert [row["missing"] for row in results["studies"][0]["configurations"]] == [0, 1]
    assert "no verdict" in results["studies"][0]["comparisons"][0]["verdict"]


def test_a_run_that_failed_once_is_tried_again(tmp_path: Path, text: Path) -> None:
    chosen = plan(tmp_path / "later.txt", seeds=1)
    store = Store.create(tmp_path / "c", chosen)

    def look(running: dict[str, float], done: int, failed: int) -> bool:
        if not running:  # the first try has come to nothing
            text.rename(tmp_path / "later.txt") if text.exists() else None
        return True

    Engine(store, 1, 120.0).run(chosen.cells().values(), look)
    assert store.failures() == {}
    assert store.done() == set(chosen.cells())


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path, text: Path) -> None:
    chosen = plan(text, settings={**TINY, "steps": 10**7}, seeds=1)
    store = done_in(tmp_path / "c", chosen, 1, limit=1.0)
    (why,) = store.failures().values()
    assert "time limit" in why


def test_what_is_done_is_not_done_again(tmp_path: Path, text: Path) -> None:
    chosen = plan(text)
    store = done_in(tmp_path / "c", chosen, 1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "cells").iterdir()}
    again, read = Store.open(tmp_path / "c")
    assert read == chosen
    assert again.done() == set(chosen.cells()) == {path.stem for path in before}
    assert store.failures() == {}


def test_a_stop_leaves_what_is_done(tmp_path: Path, text: Path) -> None:
    chosen = plan(text, seeds=4)
    store = Store.create(tmp_path / "c", chosen)
    Engine(store, 1, 120.0).run(chosen.cells().values(), lambda running, done, failed: done < 1)
    assert 1 <= len(store.done()) < 4


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(RunError, match="empty or a new folder"):
        Store.create(tmp_path, plan(text))
    with pytest.raises(RunError, match=r"plan\.json"):
        Store.open(tmp_path)


def test_a_plan_that_json_can_not_hold_leaves_no_folder(tmp_path: Path, text: Path) -> None:
    for value in (datetime.date(2020, 1, 1), math.inf):
        with pytest.raises(ConfigError, match="finite numbers, words or lists"):
            Store.create(tmp_path / "odd", plan(text, vary={"schedule": [value]}))
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    ("kind", "content"),
    [("cells", "{}"), ("cells", "[]"), ("cells", '{"outcome": 3}'), ("clock", "3"), ("failed", '{"why": 3}')],
)
def test_a_damaged_cell_is_named(tmp_path: Path, text: Path, kind: str, content: str) -> None:
    chosen = plan(text)
    store = Store.create(tmp_path / "run", chosen)
    (cell, *_) = chosen.cells().values()
    (tmp_path / "run" / kind / f"{cell.id}.json").write_text(content)
    read = {"cells": store.outcome, "clock": store.clock, "failed": lambda cell: store.failures()}[kind]
    with pytest.raises(RunError, match=f"{cell.id}.*delete it"):
        read(cell)


def test_the_estimate_grows_with_the_work(text: Path) -> None:
    small = list(plan(text).cells().values())
    large = list(plan(text, settings={**TINY, "steps": 3000}).cells().values())
    assert estimate_seconds([], 2) == 0
    assert estimate_seconds(large, 1) > estimate_seconds(small, 1) > 0
    assert longest_first([*small, *large])[0] in large


def test_json_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        to_json({"a": float("nan")})


def test_what_is_timed_runs_alone_when_all_else_is_done(tmp_path: Path, text: Path) -> None:
    studies = [
        {"name": "a", "protocol": "train", "depth": [1], "seeds": 4, "settings": TINY},
        {"name": "b", "protocol": "speed", "depth": [1], "seeds": 2, "settings": TINY},
    ]
    chosen = parse_plan({"studies": studies, "text": str(text)}, "here")
    store = Store.create(tmp_path / "c", chosen)
    seen: list[tuple[set[str], int]] = []

    def look(running: dict[str, float], done: int, failed: int) -> bool:
        seen.append(({name.split("-")[0] for name in running for _ in range(2)}, done + failed))
        timed = [name for name in running if name.startswith("speed")]
        assert not timed or len(running) == 1
        assert not timed or done >= 4
        return True

    Engine(store, 2, 120.0).run(list(chosen.cells().values())[::-1], look)
    assert store.failures() == {}
    assert len(store.done()) == 6
    assert any("speed" in kinds for kinds, _ in seen)
    assert any("train" in kinds for kinds, _ in seen)


def test_speed_is_no_part_of_results_but_of_timings(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders with other times have the same results.json."""
    study = {"name": "speed", "protocol": "speed", "depth": [1], "seeds": 2, "settings": TINY}
    chosen = parse_plan({"claims": ["C2"], "studies": [study], "text": str(text)}, "here")
    found = []
    for name in ("one", "two"):
        store = done_in(tmp_path / name, chosen, 1)
        results, timings = collect(chosen, store, load_corpus(str(text))), collect_timings(chosen, store)
        assert results["claims"] == results["studies"] == []
        assert [card["id"] for card in timings["claims"]] == ["C2"]
        assert all(
            set(clock["ratios"]) == {"norm", "norm, torch.nn", "block", "step"} for clock in timings["cells"].values()
        )
        found.append(to_json(results))
    assert found[0] == found[1]


def test_commands_repeat_a_claim(tmp_path: Path, text: Path) -> None:
    from omninorm.experiments.compare import preset
    from omninorm.experiments.compare.results import _command

    assert _command("C3", preset("chapter")) == _command("C3", preset("C3")) == "omninorm compare --preset C3"
    assert _command("C3", preset("quick")) == "omninorm compare --preset quick"
    assert _command("C3", plan(text)) == "omninorm compare plan.json"
    own = preset("C3").model_copy(update={"model": "mine:build", "text": "x"})
    assert _command("C3", own) == "omninorm compare --preset C3 --model mine:build --text TEXT"
