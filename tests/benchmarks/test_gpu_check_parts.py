"""The parts of the check of omninorm on a GPU: numerics, compiling ahead, variants, the watch, and the log of tests."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_check import numerics, place, pytest_log, tests, training, variants, warming, watch, worker  # noqa: E402
from gpu_check.items import Item  # noqa: E402
from gpu_check.sizes import QUICK, TINY  # noqa: E402


def options(device: str = "cpu", **changes: Any) -> argparse.Namespace:
    given = {"device": device, "quick": False, "parts": None, "json": Path("gpu.json"), "peers": None}
    return argparse.Namespace(**{**given, **changes})


# Numerics -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_numerics_comes_before_the_second_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "our_backends", lambda device: ["triton", "torch"])
    names = [name for name, _, _ in numerics.groups("cpu", QUICK)]
    kinds = [name for name in numerics.CHECKS if name != numerics.LARGE]
    assert names[:2] == ["triton rms_norm bfloat16", "triton layer_norm bfloat16"]
    assert names[2 : 2 + len(kinds)] == [f"triton {kind}" for kind in kinds]
    assert len(names) == len(set(names)) == len(kinds) + 2 * 2 * 4


def test_every_case_of_our_kernels_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "our_backends", lambda device: ["triton", "torch"])
    ours = [case for _, backend, found in numerics.groups("cpu", QUICK) if backend == "triton" for case in found]
    assert len(numerics.warming("cpu", QUICK)) == len(ours) > 100


def test_an_error_above_the_allowed_one_and_nan_are_wrong() -> None:
    found = numerics.judged([{"case": "a", "y": 0.5, "dx": 1.5}, {"case": "b", "y": float("nan")}, ["a sentence"], []])
    assert found["wrong"] == [
        "a sentence", "dx of a is off by 1.5 × the allowed error", "y of b is off by nan × the allowed error"
    ]  # fmt: skip
    assert found["worst"]["dx"] == 1.5
    assert found["worst"]["y"] != found["worst"]["y"]
    assert found["cases"] == 4


# Compiling ahead ----------------------------------------------------------------------------------------------------


def test_a_job_is_taken_once_and_counted_when_it_is_done(tmp_path: Path) -> None:
    first, second = warming.Jobs(tmp_path), warming.Jobs(tmp_path)
    assert [first.take("speed 0"), second.take("speed 0"), second.take("speed 1")] == [True, False, True]
    assert first.done("speed") == 0
    second.finish("speed 1")
    assert (first.done("speed"), first.done("numerics")) == (1, 0)


def test_waiting_for_compilers_ends_at_its_limit_and_when_the_jobs_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "_jobs", lambda options, part: [print, print])
    monkeypatch.setattr(warming, "_start", lambda *_: subprocess.Popen(["sleep", "60"]))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with warming.Warmers(options("cuda")) as warmers:
        jobs = warming.Jobs(Path(warmers._folder.name))
        jobs.finish("speed 0")
        assert "for 1 of 2 jobs" in warmers.wait("speed", time.time() + 0.3)
        jobs.finish("speed 1")
        start = time.time()
        assert "for 2 of 2 jobs" in warmers.wait("speed", time.time() + 60)
        assert time.time() - start < 5
    assert warmers._processes == []


@pytest.mark.slow
def test_a_compiling_process_does_every_job(tmp_path: Path) -> None:
    jobs = warming.Jobs(tmp_path)
    assert jobs.take("training 0")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--parts", "training"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*command, "--json", tmp_path / "x.json", "--warm", tmp_path], env=environment, timeout=300)
    assert done.returncode == 0
    assert jobs.done("training") == len(training.names("cpu")) - 1  # the first was taken by this test


# Variants -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_variants_take_turns_and_one_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    given = options(json=tmp_path / "gpu.json")
    seconds, counted, failed = variants.take_turns(given, ["torch.nn", "omninorm no-such"], 3)
    assert list(seconds) == list(counted) == ["torch.nn"]
    assert len(seconds["torch.nn"]) == 3
    assert all(each > 0 for each in seconds["torch.nn"])
    assert counted["torch.nn"]["recompiled"] == 0
    assert "ConfigError: The back end must be one of" in failed["omninorm no-such"]


def test_graph_breaks_recompilations_and_warnings_of_a_variant_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"warnings": ["UserWarning: slow"], "graph_breaks": ["a call"], "recompiled": 2}
    monkeypatch.setattr(
        training, "take_turns", lambda *_: ({"torch.nn": [0.02, 0.01, 0.04]}, {"torch.nn": counted}, {})
    )
    found = training.measure(options(), TINY, "")
    assert found["wrong"] == [
        "torch.nn: UserWarning: slow",
        "torch.nn: a graph break: a call",
        "torch.nn: compiled 2 more graphs after its first steps",
    ]
    assert found["variants"]["torch.nn"]["ms"] == 20
    assert found["variants"]["torch.nn"]["blocks_ms"] == [20, 10, 40]


def test_speed_over_torch_is_the_median_over_the_rounds() -> None:
    assert training._ratios({"torch.nn": [2.0, 3.0, 4.0], "omninorm auto": [1.0, 3.0, 8.0]}) == {
        "omninorm auto": [2.0, 1.0, 0.5]
    }


# The watch ----------------------------------------------------------------------------------------------------------


def test_a_watched_block_is_compared_with_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 9.0, 2.0, 3.0, 4.0])  # seconds of blocks: off, every=10, off, every=10, off
    monkeypatch.setattr(place, "wall", lambda run, device: next(clock))
    monkeypatch.setattr(watch, "BLOCKS", {None: 1, 10: 1})
    seconds = watch._in_between({None: print, 10: print}, "cpu", 2)
    assert seconds == {None: [(2.0, 1.0), (4.0, 2.0)], 10: [(9.0, 1.5), (3.0, 3.0)]}
    found = watch._report(seconds, {10: 3})
    assert found["step_ms"] == 1500
    assert found["watched"]["every=10"]["blocks_ms"] == [7500, 0]
    assert found["watched"]["every=10"]["extra_ms"] == 3750
    assert found["watched"]["every=10"]["ratio"] == 3.5
    assert found["noise_ms"] == 1500
    assert found["wrong"] == ["every=10 has 3 samples, not 4"]


def test_every_block_of_the_watch_has_two_samples() -> None:
    assert all(steps >= 2 * every for every, steps in watch.BLOCKS.items() if every is not None)


# Warnings and tests -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_warnings_of_an_item_are_wrong_once_each() -> None:
    def run() -> dict[str, Any]:
        for _ in range(2):
            warnings.warn("this is slow", stacklevel=1)
        return {"wrong": ["a sentence"]}

    assert worker._attempt(Item("one", 1.0, run))["wrong"] == ["a sentence", "UserWarning: this is slow"]


def test_a_run_of_tests_that_is_ended_names_its_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # which processes of pytest-xdist, like this one, pass on
    file = tmp_path / "test_some.py"
    file.write_text(
        "import time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "def test_hangs(): time.sleep(600)\n"
    )
    log, output = tmp_path / "log.jsonl", tmp_path / "output.txt"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "gpu_check.pytest_log", str(file)]

    class EndsAfterTheFailure(subprocess.Popen[bytes]):
        """Its time is over as soon as the failure is written, however long pytest takes to start."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout is not None and not (log.exists() and pytest_log.read(log)["failures"]):
                assert self.poll() is None, output.read_text()
                time.sleep(0.1)
            if timeout is not None:
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", EndsAfterTheFailure)
    assert tests._run_pytest([*command, "-c", os.devnull, "-p", "no:cacheprovider"], log, output, 40.0) is None
    found = pytest_log.read(log)
    assert found["passed"] == 1
    (failure,) = found["failures"]
    assert failure["test"].endswith("test_bad")
    assert "test_some.py:3: in test_bad" in failure["text"]
    assert found["wrong"] == [f"{failure['test']}: AssertionError: not equal"]
    assert json.loads(log.read_text().splitlines()[0])["outcome"] == "passed"
