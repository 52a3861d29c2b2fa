"""The check of omninorm on a GPU (benchmarks/gpu.py): dry runs of all its parts, its results file, and the page of them."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_page  # noqa: E402
from gpu_check import supervisor  # noqa: E402
from gpu_check.options import sizes_of  # noqa: E402
from gpu_check.results import Results  # noqa: E402
from gpu_check.sizes import FULL, QUICK  # noqa: E402

PARTS = ["numerics", "speed", "training", "watch", "tests", "trace"]


def run(*arguments: str | Path, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def check_parts(path: Path, parts: list[str]) -> dict[str, Any]:
    data = json.loads(path.read_text())
    assert list(data["parts"]) == parts
    for name, part in data["parts"].items():
        assert part["status"] == "done", name
        assert part["items"], name
        for key, item in part["items"].items():
            assert "error" not in item, (name, key, item)
            assert not item.get("wrong"), (name, key, item)
            assert not item.get("failed"), (name, key, item)
    return data


# Compiled training and watching take two minutes, and nothing but the interpreter's run has them.
@pytest.mark.slow
@pytest.mark.parametrize(
    "parts", [["numerics", "speed", "trace"], pytest.param(PARTS, marks=pytest.mark.exhaustive)], ids=",".join
)
def test_dry_run_by_the_interpreter_measures_its_parts_and_makes_a_page(tmp_path: Path, parts: list[str]) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "out" / "gpu.json"
    arguments = ["--device", "cpu", "--json", path, "--parts", ",".join(parts)]
    done = run(*arguments, interpreted=True)
    assert done.returncode == 0, done.stdout + done.stderr
    data = check_parts(path, parts)
    assert data["machine"]["backends"] == ["triton"]
    names = {row["contestant"] for row in data["parts"]["speed"]["items"]["rms_norm bf16 8×64"]["measured"]}
    assert names == {"copy", "omninorm triton", "torch", "torch.compile"}
    with gzip.open(path.with_name("gpu-trace.json.gz")) as file:
        assert json.load(file)["traceEvents"]
    text = gpu_page.page(data)
    for title in ("Numerics", "Speed of the norms", "Host time of a call"):
        assert f"### {title}\n" in text

    before = path.read_bytes()
    assert run(*arguments, interpreted=True).returncode == 0
    assert json.loads(path.read_text())["parts"] == json.loads(before)["parts"]  # nothing was measured again


@pytest.mark.slow
def test_dry_run_on_the_simulated_accelerator_counts_host_waits_and_makes_a_page(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = run("--device", "simgpu", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    data = check_parts(path, PARTS)
    waits = data["parts"]["watch"]["items"]["host waits"]
    assert (waits["plain"], set(waits["unsampled"]), waits["sampled"]) == (0, {0}, [1, 1])
    text = gpu_page.page(data)
    for title in ("Targets", "Speed of the norms", "Training", "The watch"):
        assert f"### {title}\n" in text
    assert text.endswith("### Wrong, failed or not run\n\nNothing.")


def test_a_machine_without_a_gpu_is_refused_with_a_sentence(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run("--quick", "--json", tmp_path / "gpu.json")
    assert done.returncode == 2
    assert done.stderr == "PyTorch sees no GPU here. For a dry run without one, pass --device simgpu.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--parts", "speed,sped"],
            "--parts must be some of numerics, speed, training, watch, tests, trace, got 'sped'",
        ),
        (["--peers", "no/such/folder"], "--peers must be a folder of wheels, got 'no/such/folder'"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_budgets_leave_time_to_end_processes() -> None:
    assert FULL.seconds + 20 <= 480
    assert QUICK.seconds + 20 <= 240
    assert list(FULL.budgets) == PARTS
    assert list(QUICK.budgets) == PARTS[:4]


# The supervisor -----------------------------------------------------------------------------------------------------


def options(path: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(device="simgpu", quick=False, parts=None, json=path, peers=None, **changes)


def test_a_crash_is_recorded_and_a_new_process_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def crash_once(given: argparse.Namespace, end: float) -> int:
        starts.append(end)
        results = Results(given.json)
        if len(starts) == 1:
            results.start("speed", "an item", 60.0)
            return -11
        assert "error" in results.part("speed")["items"]["an item"]
        results.start("speed", "another", 60.0)
        results.record("speed", "another", {"wrong": []})
        return 0

    monkeypatch.setattr(supervisor, "_run_worker", crash_once)
    path = tmp_path / "gpu.json"
    assert supervisor.supervise(options(path)) == 1
    items = json.loads(path.read_text())["parts"]["speed"]["items"]
    assert items["an item"]["error"] == "the process ended with exit code -11"
    assert items["another"]["wrong"] == []
    assert len(starts) == 2


def test_an_item_that_hangs_is_ended_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    results = Results(path, {"device": "simgpu"})
    results.start("speed", "an item", 0.5)
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **more: start(["sleep", "600"], **more))
    begin = time.monotonic()
    assert supervisor._run_worker(options(path), time.time() + 60) == -9
    assert time.monotonic() - begin < 30


def test_results_continue_only_with_the_same_header(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    first = Results(path, {"quick": False})
    for key, value in (("good", {"wrong": []}), ("bad", {"error": "failed"}), ("odd", {"x": float("nan")})):
        first.start("speed", key, 1.0)
        first.record("speed", key, value)
    same = Results(path, {"quick": False})
    same.forget_failures()
    assert set(same.part("speed")["items"]) == {"good", "odd"}
    assert same.part("speed")["items"]["odd"]["x"] == "nan"
    assert Results(path, {"quick": True}).data["parts"] == {}
    assert set(json.loads(path.with_name("gpu.json.old").read_text())["parts"]["speed"]["items"]) >= {"good"}
    assert sizes_of(options(path)).model["d_model"] == 32


# The page -----------------------------------------------------------------------------------------------------------


def measured(of_copy: float, ratio: float, extra: float) -> dict[str, Any]:
    """Results of one size in which ours reaches a share of copying, a ratio to the best peer, and a cost of the watch."""
    rows = [
        {"contestant": name, "pass": which, "us": 1.0, "gb_per_s": 2900.0, "of_copy": share}
        for name, which, share in [
            ("copy", "forward", 1.0), ("omninorm triton", "forward", of_copy), ("omninorm triton", "backward", 0.81),
        ]
    ]  # fmt: skip
    speed = {"kind": "rms_norm", "dtype": "bf16", "rows": 4096, "width": 1024, "measured": rows, "failed": {}}
    speed["ratios"] = [{"contestant": "omninorm triton", "pass": "forward", "peer": "quack", "ratio": ratio}]
    watched = {"every=10": {"ratio": 1 + extra, "extra_ms": extra * 100}}
    gpu = {"devices": [{"memory_gib": 79.2}], "driver": "NVIDIA 580", "runtime": "CUDA 13.0", "triton": "3.6.0"}
    machine = {"name": "NVIDIA H100", "gpu": gpu, "torch": "2.11.0", "omninorm": "0.1.0", "commit": "a" * 40}
    return {
        "header": {"device": "cuda", "quick": False},
        "machine": {**machine, "peers": {"liger": "available"}, "backends": ["triton"]},
        "parts": {
            "speed": {"status": "done", "seconds": 1.0, "items": {"one": speed}},
            "watch": {"status": "out of time", "seconds": 1.0,
                      "items": {"overhead, long steps": {"step_ms": 40.0, "watched": watched, "wrong": []}}},
        },
    }  # fmt: skip


def test_the_page_says_which_targets_are_missed(tmp_path: Path) -> None:
    text = gpu_page.page(measured(of_copy=0.85, ratio=1.2, extra=0.03))
    assert (
        "| omninorm triton: forward at least 90% of copy bandwidth | 85% (rms_norm bf16 4096×1024) | **missed** at 1 of 1 |"
        in text
    )
    assert (
        "| omninorm triton: backward at least 80% of copy bandwidth | 81% (rms_norm bf16 4096×1024) | met at all 1 |"
        in text
    )
    assert "1.20 × (rms_norm bf16 4096×1024 forward, quack) | **missed** at 1 of 1 |" in text
    assert "| watch: at most 2% of a step of about 100 ms at every=10 | 3.0% | **missed** at 1 of 1 |" in text
    assert "- watch: out of time after 1 items" in text
    assert "Measured on **NVIDIA H100**, 79.2 GiB; driver NVIDIA 580, CUDA 13.0, torch 2.11.0, Triton 3.6.0" in text
    assert "missed" not in gpu_page.page(measured(of_copy=0.91, ratio=1.04, extra=0.0199))


@pytest.mark.parametrize(
    ("torch_us", "host_us", "chosen"),
    [
        (1.4, 10.0, "torch"),  # on the GPU 1.9 against 2.0
        (1.6, 10.0, "triton"),  # 2.1 against 2.0
        (1.6, 11.0, "torch"),  # but the host needs longer
        (1.6, None, "torch"),  # the host's time was not measured
    ],
)
def test_triton_is_chosen_where_neither_gpu_nor_host_needs_longer(
    tmp_path: Path, torch_us: float, host_us: float | None, chosen: str
) -> None:
    data = measured(0.9, 1.0, 0.0)
    speed = data["parts"]["speed"]["items"]
    speed["one"]["measured"] += [
        {"contestant": "omninorm torch", "pass": which, "us": us, "gb_per_s": 1.0, "of_copy": 0.5}
        for which, us in (("forward", 0.5), ("backward", torch_us), ("add", 0.1))
    ]
    if host_us is not None:
        times = {"omninorm.RMSNorm torch": 10.0, "omninorm.RMSNorm triton": host_us}
        passes = ("forward_us", "with_graph_us", "backward_us")
        times = {name: dict.fromkeys(passes, us) for name, us in times.items()}
        speed["host time of a call"] = {"width": 1024, "times": times}
    path, other = tmp_path / "measured.json", {"device": "another"}
    path.write_text(json.dumps({"default": "torch", "measurements": [other, {"device": "NVIDIA H100"}]}))
    gpu_page.write_table(path, data, "gpu.json")
    kept, new = json.loads(path.read_text())["measurements"]
    assert kept == other
    size = {"operator": "rms_norm", "dtype": "bfloat16", "width": 1024, "rows": 4096, "compiled": False}
    assert new == {"device": "NVIDIA H100", **size, "backend": chosen, "run": "gpu.json"}


def test_results_of_a_dry_run_do_not_reach_the_page(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    data = measured(0.9, 1.0, 0.0)
    data["header"]["device"] = "cpu"
    path.write_text(json.dumps(data))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_page.py"), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "has the results of a dry run, whose times mean nothing" in done.stderr


def test_the_committed_page_holds_results_or_says_that_there_are_none() -> None:
    document = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    between = document.split(gpu_page.BEGIN)[1].split(gpu_page.END)[0]
    assert between.strip() == gpu_page.NOTHING.strip() or "Measured on **" in between
    assert gpu_page.between_markers(document, between) == document
