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


MODELS = """
import os, time
from torch import nn
from omninorm import Block, NormConfig
from omninorm.placement import FinalNorm, enter

class Small(nn.Module):
    def __init__(self, norm, depth, vocab_size):
        super().__init__()
        self.norm, self.embedding = norm, nn.Embedding(vocab_size, 8)
        parts = lambda: (nn.Linear(8, 8), nn.Linear(8, 8))
        self.blocks = nn.ModuleList(Block(norm, 8, *parts(), block=n, blocks=depth) for n in range(1, depth + 1))
        self.final, self.head = FinalNorm(norm, 8), nn.Linear(8, vocab_size)

    def forward(self, tokens):
        stream = enter(self.norm, self.embedding(tokens))
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.final(stream))

def build(norm, depth, vocab_size):
    print("built")
    return Small(norm, depth, vocab_size)

def deaf(norm, depth, vocab_size):
    return Small(NormConfig(), depth, vocab_size)

def dies(norm, depth, vocab_size):
    return os._exit(9) if norm.normalization == "layernorm" else Small(norm, depth, vocab_size)

def hangs(norm, depth, vocab_size):
    return time.sleep(1000) if norm.normalization == "layernorm" else Small(norm, depth, vocab_size)
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "omninorm", "compare", *arguments]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=180, check=False, cwd=cwd)


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


def test_claims_end_as_cards_and_as_a_page(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path)
    Path(plan).write_text(Path(plan).read_text().replace("title:", "claims: [C3]\ntitle:"))
    done = run(plan, "--text", text, "--out", str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr
    assert "C3  Subtracting the mean is not needed" in done.stdout
    assert "→ not enough evidence: needs about" in done.stdout
    assert "Again: omninorm compare plan.json" in done.stdout
    page = tmp_path / "c" / "report.html"
    whole = page.read_bytes()
    page.unlink()
    reported = subprocess.run(
        [sys.executable, "-m", "omninorm", "report", str(tmp_path / "c")], capture_output=True, text=True, check=False
    )
    assert "C3  Subtracting" in reported.stdout
    assert page.read_bytes() == whole


def models(folder: Path) -> None:
    (folder / "models_of_mine.py").write_text(MODELS)


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path)
    models(tmp_path)
    done = run(plan, "--text", text, "--out", "c", "--model", "models_of_mine:build", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 runs to do, about" in done.stdout
    cells = [json.loads(path.read_text())["cell"] for path in (tmp_path / "c" / "cells").glob("*.json")]
    assert len(cells) == 4
    assert {cell["model"] for cell in cells} == {"models_of_mine:build"}
    assert "d_model" not in cells[0]["settings"]


def test_a_model_that_ignores_its_norm_is_found_out(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path)
    models(tmp_path)
    done = run(plan, "--text", text, "--out", "c", "--model", "models_of_mine:deaf", cwd=tmp_path)
    assert done.returncode == 2
    assert "for layernorm, pre, 4 blocks and rmsnorm, pre, 4 blocks" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "c").exists()


# The limit holds for the others, too, which a busy machine may slow down.
@pytest.mark.parametrize(
    ("name", "seconds", "why"),
    [("dies", "300", "its process ended (exit code 9)"), ("hangs", "8", "longer than 8 s")],
    ids=["dies", "hangs"],
)
def test_a_model_that_ends_or_hangs_is_reported_and_the_others_go_on(
    tmp_path: Path, name: str, seconds: str, why: str
) -> None:
    plan, text = write_plan(tmp_path)
    models(tmp_path)
    limit = ("--time-limit", seconds, "--workers", "2")
    done = run(plan, "--text", text, "--out", "c", "--model", f"models_of_mine:{name}", *limit, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "for how long is not known" in done.stdout
    assert "2 runs failed" in done.stdout
    failures = json.loads((tmp_path / "c" / "results.json").read_text())["failures"]
    assert [why in each for each in failures.values()] == [True, True]
    assert len(list((tmp_path / "c" / "cells").glob("*.json"))) == 2


@pytest.mark.slow
def test_ray_gives_the_same_results_and_reports_the_same_failures(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path)
    models(tmp_path)
    shared = (plan, "--text", text, "--workers", "2", "--model", "models_of_mine:dies", "--time-limit", "60")
    here = run(*shared, "--out", "here", cwd=tmp_path)
    there = run(*shared, "--out", "there", "--engine", "ray", cwd=tmp_path)
    assert (here.returncode, there.returncode) == (0, 0), there.stderr
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("here", "there"))
    assert set(one["failures"]) == set(other["failures"])
    assert all("its process ended" in why for why in other["failures"].values())
    assert {**one, "failures": {}} == {**other, "failures": {}}
    assert len(list((tmp_path / "there" / "cells").glob("*.json"))) == 2


def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path)
    done = subprocess.run(
        command(plan, "--text", text, "--out", str(tmp_path / "c"), "--engine", "ray"),
        capture_output=True, text=True, timeout=180, check=False, env={**os.environ, "RAY_ADDRESS": "nowhere"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "a Ray that can be reached" in done.stderr
    assert "Traceback" not in done.stderr


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
        (["--engine", "slurm"], "engine must be one of local, ray"),
        (["--model", "nowhere"], "package.module:function"),
        (["--model", "nowhere:build"], "No module named 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_text_too_short_for_a_held_out_part_is_one_sentence(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path)
    Path(text).write_text("And God said, Let there be light: and there was light. " * 2)
    done = run(plan, "--text", text, "--out", str(tmp_path / "c"))
    assert done.returncode == 2
    assert "the held-out part of the text must have at least" in done.stderr
    assert not (tmp_path / "c").exists()
