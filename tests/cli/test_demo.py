"""`omninorm demo`: its output, its workers, interruption and resumption, and the input that it rejects."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from helpers.waiting import wait_until

from omninorm.experiments.demo import VARIANTS, demo_plans, prepare
from omninorm.experiments.runs import open_run
from omninorm.record import RECORD_FILE, final_status, read_history, read_record

RUNS = list(VARIANTS)


def steps_done(folder, name: str) -> int:
    return sum(event["kind"] == "step" for event in read_record(folder / name / RECORD_FILE))


def check_results(folder, out: str) -> None:
    """Four ended runs, whose numbers are in the table, a figure, and a sample of the best."""
    results = json.loads((folder / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == RUNS
    best = min((run for run in results["runs"] if run["verdict"] == "learned"), key=lambda run: run["bits_per_byte"])
    for run in results["runs"]:
        assert final_status(folder / run["name"] / RECORD_FILE) in ("finished", "diverged")
        label = VARIANTS[run["name"]][0]
        assert label in out
        assert (folder / run["name"] / "report.html").exists()
        if run["bits_per_byte"] is not None:
            assert f"{run['bits_per_byte']:.3f}" in out
    assert f"{results['baselines']['unigram']:.3f}" in out
    assert f"A sample from {VARIANTS[best['name']][0]}" in out
    assert str(folder / "demo.png") in out
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in out, "control codes in what is not a terminal"


def test_a_demo_whose_runs_are_done_prints_table_sample_figure_and_reports(command, tmp_path, text_file) -> None:
    """The runs are trained in this process, which is faster than a worker for each."""
    prepare(tmp_path, demo_plans(1, 12, str(text_file)))
    for name in RUNS:
        with open_run(tmp_path / name) as run:
            run.train()
    code, out, err = command("demo", "--resume", tmp_path)
    assert (code, err) == (0, "")
    check_results(tmp_path, out)


@pytest.mark.slow
def test_an_interrupted_demo_resumes_in_workers_without_repeating_a_step(
    spawn, command, tmp_path, monkeypatch, text_file
) -> None:
    """One worker at first, then one for each run; they do not import from the current folder."""
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

    (tmp_path / "rich.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    code, out, err = command("demo", "--resume", "demo", "--workers", 4)
    assert (code, err) == (0, "")
    check_results(Path("demo"), out)
    history = read_history(folder / RUNS[0] / RECORD_FILE)
    steps = [event["step"] for event in history if event["kind"] == "step"]
    assert steps == list(range(1, 81)), "each step is computed once"
    assert {run["steps"] for run in json.loads((folder / "results.json").read_text())["runs"]} <= set(range(81))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--depth", "0"], ("n_layers", "got 0")),
        (["--steps", "0"], ("steps", "got 0")),
        (["--workers", "0"], ("workers", "got 0")),
        (["--text", "no-such-file"], ("no-such-file",)),
        (["--resume", "x", "--steps", "9", "--depth", "3"], ("--resume", "--depth 3, --steps 9", "new demo")),
        (["--resume", "no-such-demo"], ("no-such-demo", "No such file or folder")),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, monkeypatch, arguments, named) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("demo", *arguments)
    assert code == 2
    for part in named:
        assert part in err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("*")) == []


def test_an_output_folder_that_is_not_empty_is_refused(command, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    code, _, err = command("demo", "--out", tmp_path)
    assert code == 2
    assert f"--out must be a new or empty folder, got {tmp_path}. " in err
    assert f"demo --resume {tmp_path}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_worker_that_fails_is_reported_with_its_error(command, tmp_path, text_file) -> None:
    """The text disappears after the runs are prepared, so that the first worker can't read it."""
    folder = tmp_path / "demo"
    prepare(folder, demo_plans(2, 3, str(text_file)))
    text_file.unlink()
    code, _, err = command("demo", "--resume", folder, "--workers", 1)
    assert code == 2
    assert "exit code 2" in err
    assert str(text_file) in err


def test_without_matplotlib_it_fails_before_the_training(command, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = command("demo", "--out", tmp_path / "demo")
    assert code == 2
    assert '[demo]"' in err
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_workers_of_a_killed_demo_save_checkpoints_and_end(spawn, tmp_path, text_file) -> None:
    """A worker that stayed alive after a kill -9 of the demo would hold its run's lock."""
    folder = tmp_path / "demo"
    process = spawn("demo", "--out", folder, "--text", text_file, "--depth", 2, "--steps", 5000, "--workers", 1)
    first = folder / RUNS[0]
    wait_until(lambda: (first / "config.json").exists() and steps_done(folder, RUNS[0]) >= 3)
    process.signal(signal.SIGKILL)
    wait_until(lambda: any(event["kind"] == "interrupted" for event in read_record(first / RECORD_FILE)))
    assert list((first / "checkpoints").glob("step-*"))
