"""`omninorm bench` with tiny sizes: measuring, output, interruption and invalid input."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
from helpers.waiting import wait_until

from omninorm.bench import process
from omninorm.bench.config import BenchConfig
from omninorm.bench.plan import Group, Job
from omninorm.errors import RunError

TINY = ["--rows", "4", "--widths", "24", "--dtypes", "fp32", "--threads", "1", "--seconds", "0.001"]
TINY += ["--no-compile", "--no-models"]


def test_one_job_is_measured_in_a_worker_and_written(command, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(process, "plan", lambda config: [Group(1, "raised", (Job("RMSNorm, one row", "fp32", 1, 8),))])
    folder = tmp_path / "new" / "bench"
    code, out, err = command("bench", *TINY, "--no-plot", "--out", folder)
    assert (code, err) == (0, "")
    (measured,) = json.loads((folder / "results.json").read_text())["measurements"]
    assert (measured["width"], measured["rounds"] >= 7) == (8, True)
    assert f"Written: {folder / 'results.json'}" in out
    assert [path.name for path in folder.iterdir()] == ["results.json"]


@pytest.mark.slow
def test_it_measures_prints_and_writes_results(command, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a wild ratio makes a column wide, and 80 would then cut names
    folder = tmp_path / "new" / "bench"
    code, out, err = command("bench", *TINY, "--out", folder)
    assert (code, err) == (0, "")
    results = json.loads((folder / "results.json").read_text())
    assert {each["allocator"] for each in results["measurements"]} == {"raised", "default"}
    assert len(results["measurements"]) == 5 + 1 + 2, "five jobs, the one row, and two with the default allocator"
    assert all(each["rounds"] >= 7 for each in results["measurements"])
    assert {each["norm"] for each in results["kept"]} == {"RMSNorm", "LayerNorm"}
    assert results["machine"]["cores"] >= 1
    assert results["settings"]["rows"] == [4]
    for each in results["targets"]:
        assert each["name"] in out
    assert "not measured" in out
    assert f"Written: {folder / 'results.json'}" in out
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["bench.png", "results.json"]
    assert "\x1b" not in out, "control codes in what is not a terminal"


def test_json_is_the_only_output_and_no_file_is_written(command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("omninorm.bench.measure_all", lambda config, progress: {"measurements": [{"width": 8}]})
    code, out, _ = command("bench", *TINY, "--json")
    assert code == 0
    assert [each["width"] for each in json.loads(out)["measurements"]] == [8]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "many"], "--rows must be integers separated by commas, got 'many'"),
        (["--rows", "0"], "rows must be an integer ≥ 1, got 0"),
        (["--widths", ""], "widths must have at least one value"),
        (["--widths", "8,8"], "and no value twice, got (8, 8)"),
        (["--dtypes", "int8"], "dtypes must be one of fp32, bf16, fp16, got 'int8'"),
        (["--threads", "-1"], "threads must be an integer ≥ 1, got -1"),
        (["--threads", "every"], "--threads must be integers"),
        (["--seconds", "0"], "seconds must be a finite number > 0, got 0.0"),
        (["--patience", "nan"], "patience must be a finite number > 0, got nan"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(command, tmp_path, monkeypatch, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command("bench", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_reported_before_measuring(command, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = command("bench", *TINY, "--out", tmp_path / "bench")
    assert code == 2
    assert '[demo]", or pass --no-plot' in err
    assert not (tmp_path / "bench").exists()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_leaves_no_files(spawn, tmp_path) -> None:
    running = spawn("bench", *TINY, "--seconds", "600", "--out", tmp_path / "bench")
    wait_until(lambda: bool(measuring(running._process.pid)))
    workers = measuring(running._process.pid)
    time.sleep(1)  # until the parent reads from it
    running.signal(signal.SIGINT)
    code, out, err = running.wait()
    assert (code, err) == (130, "")
    assert "Stopped. Nothing was written." in out
    wait_until(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers))
    assert not (tmp_path / "bench").exists()


def measuring(pid: int) -> list[str]:
    """Return the process ids of the measuring children; others, such as git, run before them."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [child for child in file.read().split() if "omninorm.bench.worker" in command_line(child)]


def command_line(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # it has ended
        return ""


def test_a_measuring_process_that_fails_is_reported_with_its_last_output(monkeypatch) -> None:
    monkeypatch.setattr(process, "_START", "import sys; sys.exit('out of luck')")
    monkeypatch.setattr(process, "plan", lambda config: [Group(1, "raised", (Job("x", "fp32", 1, 1),))])
    with pytest.raises(RunError, match="exit code 1: out of luck"):
        process.measure_all(BenchConfig(), lambda what, done, total: None)


def test_the_environment_sets_threads_and_allocator(monkeypatch) -> None:
    for name in process.THRESHOLDS:
        monkeypatch.setenv(name, "1")
    raised, default = (process.environment(Group(3, name, ())) for name in ("raised", "default"))
    assert {name: raised[name] for name in process.THRESHOLDS} == process.THRESHOLDS
    assert not set(process.THRESHOLDS) & set(default)
    assert raised["OMP_NUM_THREADS"] == default["OMP_NUM_THREADS"] == "3"
