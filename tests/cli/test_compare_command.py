"""`omninorm compare` as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLAN = """
title: a tiny one
studies:
  - name: norms
    protocol: train
    normalization: [rmsnorm, layernorm]
    depth: [1]
    seeds: 2
    settings: {d_model: 16, n_heads: 2, seq_len: 16, batch_size: 2, eval_bytes: 256, steps: STEPS}
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "omninorm", "compare", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False)


def write_plan(folder: Path, steps: int = 3) -> tuple[str, str]:
    (folder / "p.yaml").write_text(PLAN.replace("STEPS", str(steps)))
    (folder / "text.txt").write_text("And God said, Let there be light: and there was light. " * 60)
    return str(folder / "p.yaml"), str(folder / "text.txt")


def test_from_plan_to_verdict(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path)
    done = run(plan, "--text", text, "--out", str(tmp_path / "c"), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "4 runs to do, about" in done.stdout
    assert "norms: bits per byte (less is better)" in done.stdout
    assert "layernorm pre" in done.stdout
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    assert results["text"]["name"] == "text"
    again = run("--resume", str(tmp_path / "c"), "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == results
    assert "0 runs to do" in again.stderr


@pytest.mark.parametrize("package", ["scipy", "yaml"])
def test_a_missing_package_is_named(tmp_path: Path, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from omninorm.cli import main; main(['compare', '--dry-run'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert f"without {package}" in done.stderr
    assert "omninorm[compare]" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path, steps=400)
    folder = tmp_path / "c"
    process = subprocess.Popen(
        command(plan, "--text", text, "--out", str(folder), "--workers", "1"), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list((folder / "cells").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"compare --resume {folder}" in said
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert 1 <= len(kept) < 4
    assert run("--resume", str(folder)).returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert len(after) == 4
    assert kept.items() <= after.items(), "nothing is run twice"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "qiuck"], "choose one of quick"),
        (["missing.yaml"], "a plan's file must be readable"),
        (["plan.ini"], "a plan ends in"),
        (["--resume", "nowhere"], "plan.json"),
        (["--resume", "nowhere", "--preset", "quick"], "--resume goes on"),
        (["p.yaml", "--preset", "quick"], "a comparison has one plan"),
        (["--workers", "0"], "workers must be"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
