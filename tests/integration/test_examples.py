"""The example programs run, and print what their first lines promise.

All run in one process, so that torch, transformers and Lightning are imported once.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omninorm.cli import main
from omninorm.record import read_history

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., str]

# Runs the programs that come as lines of JSON, and answers with exit code, stdout and stderr. Streams are redirected as
# file descriptors, so that what the programs' own child processes print is captured as well.
RUNNER = """
import gc, json, os, runpy, sys, tempfile, traceback
replies = os.fdopen(os.dup(1), "w")
sys.path.insert(0, sys.argv[1])
for line in sys.stdin:
    sys.argv, code = json.loads(line), 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    print(json.dumps([code, *texts]), file=replies, flush=True)
    gc.collect()
"""


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs an example on one core and without a network; returns its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUNNER, str(EXAMPLES)]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def call(name: str, *arguments: object) -> str:
            process.stdin.write(json.dumps([str(EXAMPLES / name), *map(str, arguments)]) + "\n")
            process.stdin.flush()
            code, out, err = json.loads(process.stdout.readline())
            assert code == 0, err
            assert "omninorm.watch could not" not in err, err
            return out

        yield call
        process.stdin.close()


def check_run(folder: Path, steps: int) -> None:
    """Check that a folder holds a complete record of that many steps, and a report page."""
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
def test_example_in_another_trainer_learns_without_failures(run: Run, tmp_path: Path, name: str, steps: int) -> None:
    output = run(name, tmp_path)
    assert f"steps watched: {steps}" in output
    first, last = losses(output)
    assert last < 3.0 < 5.0 < first, "the loss falls from about ln 256 = 5.5"
    assert "failures: 0" in output
    check_run(tmp_path, steps)


@pytest.mark.slow
def test_example_of_a_plain_loop_learns_without_failures(run: Run, tmp_path: Path) -> None:
    output = run("watch_loop.py", tmp_path)
    assert float(re.search(r"step 100: loss ([\d.]+)", output)[1]) < 2.7
    assert "failures: 0" in output
    check_run(tmp_path, 100)


@pytest.mark.slow
def test_example_of_a_faulty_run_is_fixed_by_the_remedy(run: Run, tmp_path: Path) -> None:
    output = run("fix_diverging_run.py", tmp_path)
    faulty, fixed = output.split("fixed: ")
    assert re.search(r"^faulty: post-norm, .* failures [1-9]", faulty)
    assert "post-norm-depth" in faulty
    assert "24 blocks" in faulty
    assert "pre-norm" in faulty.splitlines()[2], "the remedy that is then applied"
    assert "failures 0" in fixed
    before, after = (float(re.search(r"loss ([\d.]+)", part)[1]) for part in (faulty, fixed))
    assert after < before - 0.1
    for name in ("faulty", "fixed"):
        check_run(tmp_path / name, 60)


PAGE = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_example_of_a_stalled_run_prints_what_the_page_quotes(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words and steps are those of the page; losses and degrees depend a little on the processor."""
    output = run("find_a_fault.py", tmp_path)
    quoted = re.findall(r"^    (stalled|fixed), step (\d+): loss ([\d.]+)$", PAGE, re.MULTILINE)
    printed = re.findall(r"^(stalled|fixed), step (\d+): loss ([\d.]+)$", output, re.MULTILINE)
    assert [line[:2] for line in printed] == [line[:2] for line in quoted]
    for line, expected in zip(printed, quoted, strict=True):
        assert float(line[2]) == pytest.approx(float(expected[2]), abs=0.1), line
    alarms = [
        alarm
        for event in read_history(tmp_path / "stalled" / "record.jsonl")
        if event["kind"] == "alarms"
        for alarm in event["alarms"]
    ]
    first = alarms[0]
    text = f"step {first['step']}, {first['rule']}: {first['evidence']} {first['remedy']}"
    without_degrees = [re.sub(r"\d+°", "°", " ".join(part.split())) for part in (text, PAGE)]
    assert without_degrees[0] in without_degrees[1]
    assert not [event for event in read_history(tmp_path / "fixed" / "record.jsonl") if event["kind"] == "alarms"]
    for name in ("stalled", "fixed"):
        check_run(tmp_path / name, 160)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "fixed"), str(tmp_path / "stalled")])
    assert f"    {capsys.readouterr().out.splitlines()[0]}\n" in PAGE


@pytest.mark.parametrize(
    "seeds", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.exhaustive)]
)
def test_example_of_a_high_learning_rate_is_cured_by_qk_norm(run: Run, tmp_path: Path, seeds: int) -> None:
    lines = run("high_learning_rate.py", tmp_path, seeds).splitlines()
    assert len(lines) == 2 * seeds
    for line in lines:
        without, cured = map(float, re.search(r"loss ([\d.]+), with qk-norm ([\d.]+);", line).groups())
        assert without > cured + 0.2, line
        assert re.search(r"; attention-(logits|entropy) in blocks\.\d at step \d+, losses 0\.1 apart", line), line
        assert line.endswith("alarms with qk-norm: 0"), line


@pytest.mark.slow
def test_example_of_lora_on_saturated_attention_has_steep_gradients(run: Run, tmp_path: Path) -> None:
    lines = run("lora_saturated_attention.py", tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == ["logits 1", "logits 16", "logits 32"]
    largest = [float(re.search(r"gradient norm at most ([\d.]+)", line)[1]) for line in lines]
    assert min(largest[1:]) > 5 * largest[0]


@pytest.mark.slow
def test_example_of_surgery_on_real_weights_is_exact_and_undone(run: Run, smollm2: Path) -> None:
    output = run("surgery_smollm2.py", smollm2)
    assert re.search(r"61 norms folded, .*, 0 refused", output)
    assert float(re.search(r"maximum relative difference (\S+) in float64", output)[1]) <= 1e-10
    assert "The capital of France is Paris" in output
    assert "undone bit for bit: True; largest difference 0.0" in output


@pytest.mark.slow
def test_example_that_centers_a_model_keeps_its_loss(run: Run, tmp_path: Path) -> None:
    output = run("layernorm_to_rmsnorm.py", tmp_path)
    shares = [float(share) for share in re.search(r"by norm: (.*)", output)[1].split(", ")]
    assert len(shares) == 9
    assert all(0 < share < 0.05 for share in shares)
    before, dropped, centered = (float(loss) for loss in re.findall(r"held-out loss: ([\d.]+)", output))
    assert before == centered < dropped
    assert re.search(r"^9 norms centered, .*, 0 refused$", output, re.MULTILINE)


@pytest.mark.slow
def test_example_of_a_llama_with_swapped_norms_gives_the_same_logits(run: Run) -> None:
    output = run("speed_up_llama.py", 1)  # round
    assert "9 norms swapped, 0 refused" in output
    # transformers' norms compute in float32, whatever comes in; ours in float64 for float64.
    assert float(re.search(r"maximum relative difference in float64: (\S+)", output)[1]) < 1e-6
    for job in ("one token", "256 tokens", "a training step"):
        assert re.search(rf"{job} +[\d.]+ ms, with omninorm [\d.]+ × that", output)


@pytest.mark.slow
def test_example_of_a_comparison_in_your_model_writes_its_report(run: Run, tmp_path: Path) -> None:
    output = run("compare_your_model.py", tmp_path)
    assert re.search(r"rmsnorm pre +4 +[\d.]+ +3 learned +baseline", output)
    assert re.search(r"layernorm pre +4 +[\d.]+ +3 learned +[-+][\d.]+", output)
    assert (tmp_path / "comparison" / "report.html").exists()


@pytest.mark.slow
def test_example_of_rotating_before_quantizing_saves_the_model(run: Run, smollm2: Path) -> None:
    output = run("rotate_before_quantizing.py", smollm2)
    assert "61 norms folded, 212 weights rotated" in output
    plain, turned = (int(share) for share in re.findall(r"activation error (\d+)%", output))
    assert turned < plain / 2
    losses = [float(loss) for loss in re.findall(r"([\d.]+) nats per token", output)]
    whole, quantized, rotated = losses
    assert whole < rotated < whole + 1.0
    assert quantized > whole + 3.0, "4 bits need the rotation"


def test_every_example_is_tested_and_short() -> None:
    tested = Path(__file__).read_text()
    found = sorted(EXAMPLES.glob("*.py"))
    assert len(found) == 13
    for path in found:
        assert path.name in tested
        assert len(path.read_text().splitlines()) < 90
        assert path.read_text().startswith('"""')
