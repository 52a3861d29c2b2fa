"""The engine with real worker processes: results do not depend on order, failures are recorded, no run is repeated."""

import json
from pathlib import Path

import pytest

from omninorm.errors import RunError
from omninorm.experiments.compare import ComparePlan, engine, parse_plan, work
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


def done_here(folder: Path, chosen: ComparePlan) -> Store:
    """The comparison's folder after all runs, which this process does one by one."""
    store, corpus = Store.create(folder, chosen), load_corpus(chosen.text)
    for cell in chosen.cells().values():
        assert "done" in work.run(cell, store, lambda _: corpus)
    return store


def done_in(folder: Path, chosen: ComparePlan, workers: int, limit: float = 120.0) -> Store:
    """The comparison's folder after all runs, which worker processes do, the last one first."""
    store = Store.create(folder, chosen)
    Engine(store, workers, limit).run(list(chosen.cells().values())[::-1], lambda *_: True)
    return store


def test_results_do_not_depend_on_order_or_workers(tmp_path: Path, text: Path) -> None:
    chosen, corpus = plan(text, normalization=["rmsnorm", "layernorm"]), load_corpus(str(text))
    found = []
    for name in ("here", "workers"):
        store = done_here(tmp_path / name, chosen) if name == "here" else done_in(tmp_path / name, chosen, 2)
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


def test_a_configuration_is_reported_at_its_best_learning_rate(tmp_path: Path, text: Path) -> None:
    corpus = load_corpus(str(text))
    for protocol, lower in (("train", True), ("ramp", False)):
        chosen = plan(text, protocol=protocol, lr=[1e-6, 0.02], settings={**TINY, "steps": 30})
        store = done_here(tmp_path / protocol, chosen)
        (row,) = collect(chosen, store, corpus)["studies"][0]["configurations"]
        name = "score" if lower else "largest_rate"
        means = {}
        for cell in chosen.cells().values():
            means[cell.lr] = means.get(cell.lr, 0) + store.outcome(cell)[name] / 2
        assert row["lr"] == (min if lower else max)(means, key=means.get) == 0.02
        if lower:
            assert row["sensitivity"] == pytest.approx((means[1e-6] - means[0.02]) / 2)


def test_a_failure_is_recorded_and_the_other_runs_finish(tmp_path: Path, text: Path) -> None:
    """The held-out text is shorter than a window: the run fails twice, with a readable reason."""
    chosen = plan(text, vary={"seq_len": [16, 4000]}, seeds=1)
    store = done_in(tmp_path / "c", chosen, 1)
    (why,) = store.failures().values()
    assert "at least seq_len + 1 = 4001 tokens" in why
    assert len(store.done()) == 1
    results = collect(chosen, store, load_corpus(str(text)))
    assert results["failures"] == store.failures()
    assert [row["missing"] for row in results["studies"][0]["configurations"]] == [0, 1]
    assert "no verdict" in results["studies"][0]["comparisons"][0]["verdict"]


def test_an_answer_that_arrives_with_the_message_before_it_is_read_at_once(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the answer would wait in a buffer until the time limit, and the run would count as failed."""
    both = """
import json, os, sys
sys.stdin.readline()
os.write(1, (json.dumps({"ready": True}) + chr(10) + json.dumps({"done": "any"}) + chr(10)).encode())
sys.stdin.read()
"""
    monkeypatch.setattr(engine, "_START", both)
    chosen = plan(text, seeds=1)
    store = Store.create(tmp_path / "c", chosen)
    Engine(store, 1, 2.0).run(chosen.cells().values(), lambda *_: True)
    assert store.failures() == {}


def test_a_run_that_failed_once_is_retried(tmp_path: Path, text: Path) -> None:
    chosen = plan(tmp_path / "later.txt", seeds=1)
    store = Store.create(tmp_path / "c", chosen)

    def look(running: dict[str, float], done: int, failed: int) -> bool:
        if not running:  # the first try has come to nothing
            text.rename(tmp_path / "later.txt") if text.exists() else None
        return True

    Engine(store, 1, 120.0).run(chosen.cells().values(), look)
    assert store.failures() == {}
    assert store.done() == set(chosen.cells())


@pytest.mark.slow
def test_a_run_beyond_the_time_limit_is_ended(tmp_path: Path, text: Path) -> None:
    chosen = plan(text, settings={**TINY, "steps": 10**7}, seeds=1)
    store = done_in(tmp_path / "c", chosen, 1, limit=1.0)
    (why,) = store.failures().values()
    assert "time limit" in why


def test_finished_runs_are_found_when_the_folder_is_opened(tmp_path: Path, text: Path) -> None:
    chosen = plan(text)
    store = done_here(tmp_path / "c", chosen)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "cells").iterdir()}
    again, read = Store.open(tmp_path / "c")
    assert read == chosen
    assert again.done() == set(chosen.cells()) == {path.stem for path in before}
    assert store.failures() == {}


def test_a_stop_keeps_finished_runs(tmp_path: Path, text: Path) -> None:
    chosen = plan(text, seeds=4)
    store = Store.create(tmp_path / "c", chosen)
    Engine(store, 1, 120.0).run(chosen.cells().values(), lambda running, done, failed: done < 1)
    assert 1 <= len(store.done()) < 4


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(RunError, match=f"{tmp_path} is not empty"):
        Store.create(tmp_path, plan(text))
    with pytest.raises(RunError, match=r"plan\.json"):
        Store.open(tmp_path)


def test_the_estimate_grows_with_the_work(text: Path) -> None:
    small = list(plan(text).cells().values())
    large = list(plan(text, settings={**TINY, "steps": 3000}).cells().values())
    assert estimate_seconds([], 2) == 0
    assert estimate_seconds(large, 1) > estimate_seconds(small, 1) > 0
    assert longest_first([*small, *large])[0] in large


def test_json_refuses_numbers_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        to_json({"a": float("nan")})


@pytest.mark.slow
def test_timed_runs_run_alone_after_all_others(tmp_path: Path, text: Path) -> None:
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


def test_speed_is_part_of_timings_and_not_of_results(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders with different times have the same results.json."""
    study = {"name": "speed", "protocol": "speed", "depth": [1], "seeds": 1, "settings": TINY}
    chosen = parse_plan({"claims": ["C2"], "studies": [study], "text": str(text)}, "here")
    monkeypatch.setattr("omninorm.experiments.compare.protocols.speed.SECONDS", 0.01)
    found = []
    for name in ("one", "two"):
        store = done_here(tmp_path / name, chosen)
        results, timings = collect(chosen, store, load_corpus(str(text))), collect_timings(chosen, store)
        assert results["claims"] == results["studies"] == []
        assert [card["id"] for card in timings["claims"]] == ["C2"]
        assert all(
            set(clock["ratios"]) == {"norm", "norm, torch.nn", "block", "step"} for clock in timings["cells"].values()
        )
        found.append(to_json(results))
    assert found[0] == found[1]


def test_the_command_of_a_card_reproduces_the_claim(tmp_path: Path, text: Path) -> None:
    from omninorm.experiments.compare import preset
    from omninorm.experiments.compare.results import _command

    assert _command("C3", preset("chapter")) == _command("C3", preset("C3")) == "omninorm compare --preset C3"
    assert _command("C3", preset("quick")) == "omninorm compare --preset quick"
    assert _command("C3", plan(text)) == "omninorm compare plan.json"
    own = preset("C3").model_copy(update={"model": "mine:build", "text": "x"})
    assert _command("C3", own) == "omninorm compare --preset C3 --model mine:build --text TEXT"
