"""`omninorm demo`, small: it runs to its end, is interrupted and resumed, and refuses what it can't use."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable

import pytest

from omninorm.experiments.demo import VARIANTS
from omninorm.record import RECORD_FILE, final_status, read_history, read_record

RUNS = list(VARIANTS)


def steps_done(folder, name: str) -> int:
    return sum(event["kind"] == "step" for event in read_record(folder / name / RECORD_FILE))


def test_it_trains_all_four_and_shows_table_figure_and_places(command, tmp_path, text_file) -> None:
    folder = tmp_path / "demo"
    code, out, err = command("demo", "--out", folder, "--depth", 2, "--steps", 40, "--text", text_file)
    assert (code, err) == (0, "")
    results = json.loads((folder / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == RUNS
    best = min((run for run in results["runs"] if run["verdict"] == "learned"), key=lambda run: run["bits_per_byte"])
    for run in results["runs"]:
        assert final_status(folder / run["name"] / RECORD_FILE) in ("finished", "diverged")
        label = VARIANTS[run["name"]][0]
        assert label in out
        if run["bits_per_byte"] is not None:
            assert f"{run['bits_per_byte']:.3f}" in out
    assert f"{results['baselines']['unigram']:.3f}" in out
    assert f"A sample from {VARIANTS[best['name']][0]}" in out
    assert f"Figure   {folder / 'demo.png'}" in out
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in out, "control codes in what is not a terminal"


def test_interrupted_it_resumes_and_repeats_nothing(spawn, command, tmp_path, text_file) -> None:
    folder = tmp_path / "demo"
    arguments = ("--depth", 2, "--steps", 80, "--workers", 1)
    process = spawn("demo", "--out", folder, "--text", text_file, *arguments)
    wait_until(lambda: (folder / RUNS[0] / "config.json").exists() and steps_done(folder, RUNS[0]) >= 5)
    process.signal(signal.SIGINT)
    code, out, err = process.wait()
    assert (code, err) == (130, "")
    assert f"omninorm demo --resume {folder}" in out
    done = steps_done(folder, RUNS[0])
    assert 5 <= done < 80, "it was to be interrupted in the middle"
    assert not (folder / "results.json").exists()

    code, out, err = command("demo", "--resume", folder, "--workers", 4)
    assert (code, err) == (0, "")
    history = read_history(folder / RUNS[0] / RECORD_FILE)
    steps = [event["step"] for event in history if event["kind"] == "step"]
    assert steps == list(range(1, 81)), "each step is computed once"
    assert {run["steps"] for run in json.loads((folder / "results.json").read_text())["runs"]} <= set(range(81))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "0"], "n_layers must be an integer ≥ 1, got 0"),
        (["--steps", "0"], "steps must be an integer ≥ 1, got 0"),
        (["--workers", "0"], "workers must be an integer ≥ 1, got 0"),
        (["--text", "no-such-file"], "no-such-file"),
        (["--resume", "x", "--steps", "9"], "--resume goes on with the demo's own settings, got --steps 9"),
        (["--resume", "no-such-demo"], "a run's folder must have a config.json"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(command, tmp_path, monkeypatch, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("demo", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("*")) == []


def test_a_folder_with_something_in_it_is_refused(command, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    code, _, err = command("demo", "--out", tmp_path)
    assert code == 2
    assert f"the demo's folder must be new or empty, got {tmp_path}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_fails_is_reported_with_its_last_words(command, tmp_path, text_file) -> None:
    """The text disappears between preparing and training: the workers fail, and the demo says why."""
    folder = tmp_path / "demo"
    from omninorm.experiments.demo import demo_plans, prepare

    prepare(folder, demo_plans(2, 3, str(text_file)))
    text_file.unlink()
    code, _, err = command("demo", "--resume", folder)
    assert code == 2
    assert "each run must come to its end, got exit code 2" in err
    assert str(text_file) in err


def test_without_matplotlib_it_says_so_before_it_trains(command, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = command("demo", "--out", tmp_path / "demo")
    assert code == 2
    assert 'pip install "omninorm[demo]"' in err
    assert not (tmp_path / "demo").exists()


def test_workers_end_with_the_demo_and_leave_checkpoints(spawn, tmp_path, text_file) -> None:
    """After a kill -9 of the demo no worker may stay behind: it would hold its run's lock."""
    folder = tmp_path / "demo"
    process = spawn("demo", "--out", folder, "--text", text_file, "--depth", 2, "--steps", 5000, "--workers", 1)
    first = folder / RUNS[0]
    wait_until(lambda: (first / "config.json").exists() and steps_done(folder, RUNS[0]) >= 3)
    process.signal(signal.SIGKILL)
    wait_until(lambda: any(event["kind"] == "interrupted" for event in read_record(first / RECORD_FILE)))
    assert list((first / "checkpoints").glob("step-*"))


def test_workers_do_not_import_from_the_current_folder(command, tmp_path, monkeypatch, text_file) -> None:
    (tmp_path / "rich.py").write_text("raise SystemExit('taken from the current folder')")
    monkeypatch.chdir(tmp_path)
    code, _, err = command("demo", "--out", "demo", "--depth", 1, "--steps", 2, "--text", text_file)
    assert (code, err) == (0, "")


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
