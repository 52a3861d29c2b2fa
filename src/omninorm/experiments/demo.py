"""The demo's experiment: a deep Thinker is trained with four normalizations; everything else is the same."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omninorm.config import NormConfig
from omninorm.device import AUTO
from omninorm.experiments.corpus import Corpus
from omninorm.experiments.evaluate import unigram_bits_per_byte, xz_bits_per_byte
from omninorm.experiments.run_folder import CONFIG_FILE
from omninorm.experiments.runs import Plan, create_run
from omninorm.experiments.settings import TrainConfig
from omninorm.record import RECORD_FILE, final_status, read_history, read_record
from omninorm.record.files import write_file, writing
from omninorm.thinker import ThinkerConfig

# For each variant, by the name of its run's folder: its label in tables and figures, and its norms.
VARIANTS = {
    "pre-rmsnorm": ("pre-norm RMSNorm", NormConfig("rmsnorm", "pre")),
    "pre-layernorm": ("pre-norm LayerNorm", NormConfig("layernorm", "pre")),
    "post-rmsnorm": ("post-norm RMSNorm", NormConfig("rmsnorm", "post")),
    "no-norm": ("no norm", NormConfig("none", "none")),
}

# A run has learned from context if it needs less than this share of the unigram baseline's bits per byte.
LEARNED_BELOW = 0.9

# The figure shows the gradients at this step. Before training they hardly depend on the block, at any depth and with
# any norm; post-norm's gradients vanish only after the weights have grown for some steps.
GRADIENT_STEP = 20

RESULTS_FILE = "results.json"
FIGURE_FILE = "demo.png"


@dataclass(frozen=True)
class Outcome:
    """The result of one variant.

    Args:
        name: the variant's name, which is also the name of its run's folder.
        verdict: "learned", "stagnated" (less than a tenth better than the unigram baseline on held-out text),
            "diverged" (loss or gradient not finite), or "unfinished".
        bits_per_byte: bits per byte of the held-out text at the end; NaN for a run that did not finish.
        largest_grad_norm: largest gradient norm of all steps, before clipping.
        tokens_per_second: median over the steps.
        steps: number of optimizer steps.
        losses: training loss of every step in bits per byte.
        gradient_step: the step of `depth_gradients`; None if the monitor took no sample.
        depth_gradients: RMS of the loss's gradient at each block's output, block 1 first.
        diverged_at: the first step whose loss or gradient was not finite.
    """

    name: str
    verdict: str
    bits_per_byte: float
    largest_grad_norm: float
    tokens_per_second: float
    steps: int
    losses: tuple[float, ...]
    gradient_step: int | None
    depth_gradients: tuple[float, ...]
    diverged_at: int | None = None


@dataclass(frozen=True)
class Baselines:
    """Held-out bits per byte without a network: the unigram baseline, and xz after compressing the training text."""

    unigram: float
    xz: float


def demo_plans(depth: int, steps: int, text: str | None = None, seed: int = 0) -> dict[str, Plan]:
    """Return the plan of every variant, by name. Only the norms differ; seed, data and settings are the same.

    The feed-forward uses GELU, not SwiGLU: without norms, a gated feed-forward squares its input in every block, so
    24 blocks would overflow before the first step.
    """
    model = ThinkerConfig(d_model=64, n_layers=depth, n_heads=2, max_seq_len=128, feed_forward="gelu")
    train = TrainConfig(
        steps=steps,
        batch_size=8,
        seq_len=128,
        lr=3e-3,
        warmup_steps=min(20, steps),
        seed=seed,
        eval_every=steps,
        eval_bytes=16384,
        checkpoint_every=max(1, steps // 4),
        keep_checkpoints=1,
    )
    return {name: Plan(model=replace(model, norm=norm), train=train, text=text) for name, (_, norm) in VARIANTS.items()}


def prepare(folder: Path, plans: Mapping[str, Plan], device: str = AUTO) -> None:
    """Create the run folder of every variant that has none yet. Each run can be resumed separately, on any device.

    Raises:
        DataError, ConfigError, RunError: the text, a setting or the folder can't be used, respectively.
    """
    for name, plan in plans.items():
        path = folder / name
        if not (path / CONFIG_FILE).exists():
            create_run(plan, path, ["omninorm", "train", "--resume", str(path)], device=device).folder.close()


def read_outcome(path: Path, unigram: float) -> Outcome:
    """Read the outcome of a variant from its run's record; `unigram` is the baseline's bits per byte."""
    events = read_record(path / RECORD_FILE)
    steps = [event for event in events if event["kind"] == "step"]
    evaluations = [event["bits_per_byte"] for event in events if event["kind"] == "eval"]
    status = final_status(path / RECORD_FILE)
    bits = evaluations[-1] if evaluations and status == "finished" else math.nan
    norms = [event["grad_norm"] for event in events if "grad_norm" in event]
    gradient_step, gradients = _read_gradients(path)
    return Outcome(
        name=path.name,
        verdict=judge(status, bits, unigram),
        bits_per_byte=bits,
        largest_grad_norm=max(norms, key=lambda norm: math.inf if math.isnan(norm) else norm, default=math.nan),
        tokens_per_second=statistics.median(e["clock"]["tokens_per_second"] for e in steps) if steps else math.nan,
        steps=len(steps),
        losses=tuple(event["loss"] / math.log(2.0) for event in steps),
        gradient_step=gradient_step,
        depth_gradients=gradients,
        diverged_at=next((event["step"] for event in events if event["kind"] == "diverged"), None),
    )


def _read_gradients(path: Path) -> tuple[int | None, tuple[float, ...]]:
    """Return the step of the monitor's last sample up to GRADIENT_STEP, and its gradient for each block."""
    sampled = {
        event["step"]: event["signals"]["stream_grad"]
        for event in read_history(path / RECORD_FILE, {"sample"})
        if event["step"] <= GRADIENT_STEP and "stream_grad" in event.get("signals", {})
    }
    if not sampled:
        return None, ()
    step = max(sampled)
    return step, tuple(math.nan if value is None else value for value in sampled[step])


def judge(status: str | None, bits: float, unigram: float) -> str:
    """Return the verdict on a run, one of those that `Outcome` lists."""
    if status is None:
        return "unfinished"
    if status == "diverged":
        return "diverged"
    return "learned" if bits < LEARNED_BELOW * unigram else "stagnated"


def measure_baselines(corpus: Corpus, eval_bytes: int | None) -> Baselines:
    """Compute both baselines on the bytes on which the runs are evaluated."""
    held_out = corpus.held_out[:eval_bytes]
    return Baselines(unigram_bits_per_byte(corpus.train, held_out), xz_bits_per_byte(corpus.train, held_out))


def write_results(folder: Path, outcomes: Sequence[Outcome], baselines: Baselines) -> Path:
    """Write results.json, every number of the table and the figure, and return its path. NaN and inf become null."""
    values = {"baselines": asdict(baselines), "runs": [asdict(outcome) for outcome in outcomes]}
    path = folder / RESULTS_FILE
    with writing(path):
        write_file(path, json.dumps(_finite(values), indent=2, allow_nan=False).encode())
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
