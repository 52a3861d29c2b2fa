"""`omninorm compare` as a user types it."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from helpers.waiting import PATIENCE, wait_until

from omninorm.cli import comparing
from omninorm.cli.compare_tables import duration
from omninorm.errors import MissingExtraError
from omninorm.experiments.compare import needs, work
from omninorm.experiments.compare.store import Store

PLAN = """
title: a tiny one
studies:
  - name: norms
    protocol: train
    normalization: [rmsnorm, layernorm]
    depth: [1]
    seeds: SEEDS
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


def shell(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "omninorm", "compare", *arguments]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(shell(*arguments), capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=cwd)


def write_plan(folder: Path, steps: int = 3, seeds: int = 2) -> tuple[str, str]:
    (folder / "p.yaml").write_text(PLAN.replace("STEPS", str(steps)).replace("SEEDS", str(seeds)))
    (folder / "text.txt").write_text("And God said, Let there be light: and there was light. " * 60)
    return str(folder / "p.yaml"), str(folder / "text.txt")


def write_models(folder: Path) -> None:
    (folder / "models_of_mine.py").write_text(MODELS)


class Finished(NamedTuple):
    """A comparison's folder, and what `omninorm compare` printed."""

    folder: Path
    out: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Four runs of three steps, none of which can learn, with the claim C3."""
    folder = tmp_path_factory.mktemp("compare")
    plan, text = write_plan(folder)
    Path(plan).write_text(Path(plan).read_text().replace("title:", "claims: [C3]\ntitle:"))
    done = run(plan, "--text", text, "--out", str(folder / "c"), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Finished(folder / "c", done.stdout)


def test_a_comparison_prints_its_plan_tables_cards_and_files(finished: Finished) -> None:
    printed = " ".join(finished.out.split())  # long lines wrap
    for line in (
        "norms, train: rmsnorm, layernorm × pre; blocks 1; learning rates 0.003; 2 seeds",
        "4 runs in total, each in a process of one thread.",
        "4 runs, about ",
        "with 1 worker.",
        f"Output folder: {finished.folder}",
        "norms: bits per byte (lower is better, margin 0.02)",
        "C3  Subtracting the mean is not needed",
        "→ Not enough evidence (about 2 more seeds needed).",
        "- pre-norm, 1 block, learning rate 0.003: – (–), claimed < 0.02 [bits per byte]: not enough evidence",
        "Reproduce with: omninorm compare plan.json",
        f"Page     {finished.folder / 'report.html'}",
    ):
        assert " ".join(line.split()) in printed
    results = json.loads((finished.folder / "results.json").read_text())
    assert results["text"]["name"] == "text"


def test_runs_that_did_not_learn_are_counted_and_get_no_verdict(finished: Finished) -> None:
    """Three steps leave the loss at 8 bits per byte, far above the unigram baseline."""
    (study,) = json.loads((finished.folder / "results.json").read_text())["studies"]
    assert [row["outcomes"] for row in study["configurations"]] == [{"0": "stagnated", "1": "stagnated"}] * 2
    assert [row["lost"] for row in study["configurations"]] == [[], []]
    assert [each["verdict"] for each in study["comparisons"]] == ["no verdict (no run learned)"]
    assert "2 stagnated" in finished.out
    assert "no verdict (no run" in finished.out
    assert (finished.folder / "results.csv").read_text().count(",stagnated\n") == 4
    page = (finished.folder / "report.html").read_text()
    assert "<td>2 stagnated</td>" in page
    assert "no verdict (no run learned)" in page


def test_a_finished_comparison_is_not_repeated(command, finished: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished.folder / "cells").iterdir()}
    code, out, err = command("compare", "--resume", finished.folder, "--json")
    assert code == 0, err
    assert out == (finished.folder / "results.json").read_text()
    assert "All runs are done." in err
    assert {path: path.stat().st_mtime_ns for path in (finished.folder / "cells").iterdir()} == before


def test_report_writes_the_same_page_and_cards(command, finished: Finished) -> None:
    page = finished.folder / "report.html"
    whole = page.read_bytes()
    page.unlink()
    code, out, _ = command("report", finished.folder)
    assert code == 0
    assert "C3  Subtracting" in out
    assert page.read_bytes() == whole


def test_a_finished_comparison_of_a_larger_machine_is_concluded(
    command, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omninorm.experiments.compare.plan.memory_limit", lambda: 1000)
    shutil.copytree(finished.folder, tmp_path / "c")
    (tmp_path / "c" / "results.json").unlink()
    code, out, err = command("compare", "--resume", tmp_path / "c")
    assert (code, err) == (0, "")
    assert "All runs are done." in out
    assert (tmp_path / "c" / "results.json").exists()
    next((tmp_path / "c" / "cells").iterdir()).unlink()
    code, _, err = command("compare", "--resume", tmp_path / "c")
    assert code != 0
    assert "seq_len 16" in err


def test_runs_for_ray_need_not_fit_this_machine(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omninorm.experiments.compare.plan.memory_limit", lambda: 1000)
    monkeypatch.setattr(comparing, "estimate_seconds", None)  # would build a model that does not fit
    plan, text = write_plan(tmp_path)
    code, out, err = command("compare", plan, "--text", text, "--engine", "ray", "--dry-run")
    assert (code, err) == (0, "")
    assert "duration unknown" in out
    code, _, err = command("compare", plan, "--text", text, "--dry-run")
    assert code != 0
    assert "GiB" in err


def test_a_damaged_run_is_reported_set_aside_and_repeated(
    command, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(crew: comparing.Crew, store: Store) -> object:
        return SimpleNamespace(run=lambda cells, look: [work.run(cell, store) for cell in cells])

    monkeypatch.setattr(comparing, "_engine", here)
    folder = tmp_path / "c"
    shutil.copytree(finished.folder, folder)
    cell = min((folder / "cells").iterdir())
    cell.write_text(cell.read_text().replace('"score": ', '"score": "high", "was": '))
    intact = max((folder / "cells").iterdir())
    failed = folder / "failed" / intact.name
    failed.write_text("{")
    code, out, err = command("compare", "--resume", folder)
    assert (code, err) == (0, "")
    assert f"{cell} is damaged (outcome.score: " in out.replace("\n", "")
    assert "The file will be set aside and the run repeated." in out
    assert "1 run, about " in out
    assert f"{failed} is damaged (" in out.replace("\n", "")
    assert "The file will be set aside." in out, "the outcome is intact"
    assert {file.name for file in (folder / "damaged").iterdir()} == {f"cells-{cell.name}", f"failed-{intact.name}"}
    assert (folder / "results.json").read_bytes() == (finished.folder / "results.json").read_bytes()


@pytest.mark.slow
def test_a_model_of_the_users_own_is_compared(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path, seeds=1)
    write_models(tmp_path)
    done = run(plan, "--text", text, "--out", "c", "--model", "models_of_mine:build", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 runs, about" in done.stdout
    cells = [json.loads(path.read_text())["cell"] for path in (tmp_path / "c" / "cells").glob("*.json")]
    assert len(cells) == 2
    assert {cell["model"] for cell in cells} == {"models_of_mine:build"}
    assert "d_model" not in cells[0]["settings"]


@pytest.mark.slow
def test_a_model_that_ignores_its_norm_is_refused(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, text = write_plan(tmp_path)
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, err = command("compare", plan, "--text", text, "--out", "c", "--model", "models_of_mine:deaf")
    assert code == 2
    assert "for layernorm, pre, 4 blocks and rmsnorm, pre, 4 blocks" in err
    assert "Traceback" not in err
    assert not (tmp_path / "c").exists()


def run_models(folder: Path, name: str, seeds: int, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    plan, text = write_plan(folder, seeds=seeds)
    write_models(folder)
    shared = (plan, "--text", text, "--workers", "2", "--model", f"models_of_mine:{name}", "--out", str(out))
    return run(*shared, *options, cwd=folder)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A comparison in which the processes of two runs die."""
    folder = tmp_path_factory.mktemp("crashed")
    return folder / "c", run_models(folder, "dies", 2, folder / "c", "--time-limit", "300")


def check_failures(folder: Path, done: subprocess.CompletedProcess[str], why: str, seeds: int) -> None:
    """Check that the run of each seed with LayerNorm has failed for this reason, and the one with RMSNorm has not."""
    assert done.returncode == 0, done.stderr
    assert f"{2 * seeds} runs, 2 workers; duration unknown." in done.stdout
    assert re.search(rf"\b{seeds} runs? failed and (is|are) missing above", done.stdout)
    failures = json.loads((folder / "results.json").read_text())["failures"]
    assert [why in each for each in failures.values()] == [True] * seeds
    assert len(list((folder / "cells").glob("*.json"))) == seeds


@pytest.mark.slow
def test_a_model_that_crashes_is_reported_and_the_other_runs_finish(crashed) -> None:
    check_failures(*crashed, "its process ended (exit code 9)", 2)


@pytest.mark.slow
def test_a_model_that_hangs_is_reported_and_the_other_runs_finish(tmp_path: Path) -> None:
    """The limit applies to the other runs as well, which a busy machine may slow down."""
    done = run_models(tmp_path, "hangs", 1, tmp_path / "c", "--time-limit", "8")
    check_failures(tmp_path / "c", done, "longer than 8 s", 1)


@pytest.mark.slow
def test_ray_gives_the_same_results_and_reports_the_same_failures(crashed, tmp_path: Path) -> None:
    """With the same text file, whose path is a part of the runs' names."""
    options = ("--time-limit", "300", "--engine", "ray")
    there = run_models(crashed[0].parent, "dies", 2, tmp_path / "c", *options)
    assert there.returncode == 0, there.stderr
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (crashed[0], tmp_path / "c"))
    assert set(one["failures"]) == set(other["failures"])
    assert all("its process ended" in why for why in other["failures"].values())
    assert {**one, "failures": {}} == {**other, "failures": {}}
    assert len(list((tmp_path / "c" / "cells").glob("*.json"))) == 2


@pytest.mark.slow
def test_a_cluster_that_can_not_be_reached_is_one_sentence(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path)
    done = subprocess.run(
        shell(plan, "--text", text, "--out", str(tmp_path / "c"), "--engine", "ray"),
        capture_output=True, text=True, timeout=PATIENCE, check=False, env={**os.environ, "RAY_ADDRESS": "nowhere"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "Cannot connect to Ray" in done.stderr
    assert "RAY_ADDRESS" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("module", "package"), [("scipy", "scipy"), ("yaml", "PyYAML"), ("pydantic", "pydantic")])
def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=f"needs the package {package}") as caught:
        importlib.reload(needs)
    assert "omninorm[compare]" in caught.value.remedy


@pytest.mark.parametrize(
    "package", [pytest.param("scipy", marks=pytest.mark.slow), pytest.param("yaml", marks=pytest.mark.exhaustive)]
)
def test_a_missing_package_is_one_sentence_of_the_command(tmp_path: Path, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from omninorm.cli import main; main(['compare', '--dry-run'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert {"scipy": "scipy", "yaml": "PyYAML"}[package] in done.stderr
    assert "[compare]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_finished_runs_and_prints_how_to_resume(tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path, steps=400, seeds=1)
    folder = tmp_path / "c"
    process = subprocess.Popen(
        shell(plan, "--text", text, "--out", str(folder), "--workers", "1"), stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: bool(list((folder / "cells").glob("*.json"))))
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Stopped. Resume with:" in out
    assert f"compare --resume {folder}" in out
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert len(kept) == 1
    assert run("--resume", str(folder)).returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert len(after) == 2
    assert kept.items() <= after.items(), "nothing is run twice"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--preset", "qiuck"], "quick, chapter"),
        (["missing.yaml"], "No such file: missing.yaml"),
        (["plan.ini"], "plan.ini"),
        (["--resume", "nowhere"], "No such file or folder: nowhere"),
        (["--resume", "nowhere", "--preset", "quick"], "--preset quick"),
        (["p.yaml", "--preset", "quick"], "p.yaml and --preset quick"),
        (["--workers", "0"], "--workers must be"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--engine", "slurm"], "--engine must be one of local, ray"),
        (["--model", "nowhere"], "package.module:function"),
        pytest.param(["--model", "nowhere:build"], "No module named 'nowhere'", marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_one_sentence(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("compare", *arguments)
    assert code == 2
    assert named in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_ray_is_reported_before_anything_is_written(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "omninorm.experiments.compare.on_ray", raising=False)
    plan, text = write_plan(tmp_path)
    code, _, err = command("compare", plan, "--text", text, "--engine", "ray", "--out", tmp_path / "c")
    assert code == 2
    assert "--engine ray needs the package ray" in err
    assert not (tmp_path / "c").exists()


def test_a_text_too_short_for_a_held_out_part_is_one_sentence(command, tmp_path: Path) -> None:
    plan, text = write_plan(tmp_path)
    Path(text).write_text("And God said, Let there be light: and there was light. " * 2)
    code, _, err = command("compare", plan, "--text", text, "--out", tmp_path / "c")
    assert code == 2
    assert "held-out part" in err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.1, "1 second"),
        (59.4, "59 seconds"),
        (60.0, "1 minute"),
        (89.0, "1 minute"),
        (120.0, "2 minutes"),
        (7200.0, "2.0 hours"),
    ],
)
def test_durations_have_the_right_number(seconds: float, words: str) -> None:
    assert duration(seconds) == words
