"""The examples run as their first lines say, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from omninorm.record import read_history

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path) -> str:
    """An example's output, run as a reader would: on one core and without a network."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "omninorm.watch could not" not in done.stderr, done.stderr
    return done.stdout


def check_run(folder: Path, steps: int) -> None:
    """A complete record of that many steps, and a page."""
    events = read_history(folder / "record.jsonl")
    assert sum(len(event["loss"]) for event in events if event["kind"] == "steps") == steps
    assert events[-1] == {"kind": "end", "step": steps, "reason": "done"}
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def losses(output: str) -> tuple[float, float]:
    first, last = re.search(r"loss ([\d.]+) → ([\d.]+)", output).groups()
    return float(first), float(last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"), [("watch_trainer.py", 60), ("watch_accelerate.py", 60), ("watch_lightning.py", 60)]
)
def test_examples_in_other_trainers(tmp_path: Path, name: str, steps: int) -> None:
    output = run(name, tmp_path)
    assert f"steps watched: {steps}" in output
    first, last = losses(output)
    assert last < 3.0 < 5.0 < first, "it learns from about ln 256 = 5.5 on"
    assert "failures: 0" in output
    check_run(tmp_path, steps)


@pytest.mark.slow
def test_example_of_a_plain_loop(tmp_path: Path) -> None:
    output = run("watch_loop.py", tmp_path)
    assert float(re.search(r"step 100: loss ([\d.]+)", output)[1]) < 2.7
    assert "failures: 0" in output
    check_run(tmp_path, 100)


@pytest.mark.slow
def test_example_of_a_run_that_is_healed(tmp_path: Path) -> None:
    output = run("fix_diverging_run.py", tmp_path)
    sick, healed = output.split("healed: ")
    assert re.search(r"^sick: post-norm, .* failures [1-9]", sick)
    assert "post-norm-depth: Post-norm with 24 blocks" in sick
    assert "pre-norm" in sick.splitlines()[2], "the remedy that is then applied"
    assert "failures 0" in healed
    before, after = (float(re.search(r"loss ([\d.]+)", part)[1]) for part in (sick, healed))
    assert after < before - 0.1
    for name in ("sick", "healed"):
        check_run(tmp_path / name, 60)


@pytest.mark.slow
def test_example_of_surgery_on_real_weights(smollm2: Path) -> None:
    output = run("surgery_smollm2.py", smollm2)
    assert "61 gains folded, 0 refused" in output
    assert float(re.search(r"differ by (\S+) of the largest", output)[1]) <= 1e-10
    assert "The capital of France is Paris" in output
    assert "undone bit for bit: True; 0.0" in output


@pytest.mark.slow
def test_example_of_layer_norms_that_become_rms_norms(tmp_path: Path) -> None:
    output = run("layernorm_to_rmsnorm.py", tmp_path)
    shares = [float(share) for share in re.search(r"by norm: (.*)", output)[1].split(", ")]
    assert len(shares) == 9
    assert all(0 < share < 0.05 for share in shares)
    before, dropped, centred = (
        float(re.search(rf"{name} ([\d.]+)", output)[1]) for name in ("loss", "dropped", "centred")
    )
    assert before == centred < dropped
    assert "refused: {}" in output


@pytest.mark.slow
def test_example_of_a_llama_with_other_norms(tmp_path: Path) -> None:
    output = run("speed_up_llama.py", tmp_path)
    assert "9 norms swapped, 0 refused" in output
    # transformers' norms compute in float32, whatever comes in; ours in float64 for float64.
    assert float(re.search(r"logits differ by (\S+) of the largest", output)[1]) < 1e-6
    for job in ("one token", "256 tokens", "a training step"):
        assert re.search(rf"{job} +[\d.]+ ms, swapped [\d.]+ of it", output)


@pytest.mark.slow
def test_example_of_a_comparison_in_ones_own_model(tmp_path: Path) -> None:
    output = run("compare_your_model.py", tmp_path)
    assert re.search(r"rmsnorm pre +4 +[\d.]+ +0/3 +baseline", output)
    assert re.search(r"layernorm pre +4 +[\d.]+ +0/3 +[-+][\d.]+ \(.*\) +\S+", output)
    assert (tmp_path / "comparison" / "report.html").exists()


@pytest.mark.slow
def test_example_of_gains_folded_before_quantizing(smollm2: Path) -> None:
    output = run("fold_before_quantizing.py", smollm2)
    assert "61 gains folded" in output
    losses = [float(loss) for loss in re.findall(r"([\d.]+) nats per token", output)]
    whole, quantized, rotated = losses
    assert whole < rotated < whole + 1.0
    assert quantized > whole + 3.0, "4 bits need the rotation, and the rotation folded gains"


def test_every_example_is_tested_and_short() -> None:
    tested = Path(__file__).read_text()
    found = sorted(EXAMPLES.glob("*.py"))
    assert len(found) == 10
    for path in found:
        assert path.name in tested
        assert len(path.read_text().splitlines()) < 60
        assert path.read_text().startswith('"""')
