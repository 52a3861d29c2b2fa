"""The demo's experiment: one deep Thinker, four ways to normalize it, everything else the same."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import nn

from omninorm.config import NormConfig
from omninorm.experiments.corpus import Corpus, TokenData, windows
from omninorm.experiments.evaluate import unigram_bits_per_byte, xz_bits_per_byte
from omninorm.experiments.run_folder import CONFIG_FILE
from omninorm.experiments.runs import Plan, build_model, create_run
from omninorm.experiments.settings import TrainConfig
from omninorm.record import RECORD_FILE, final_status, read_record
from omninorm.record.files import write_file, writing
from omninorm.thinker import ThinkerConfig

# Name of the run's folder, what the table calls it, and its norms.
VARIANTS = {
    "pre-rmsnorm": ("pre-norm RMSNorm (μOmni)", NormConfig("rmsnorm", "pre")),
    "pre-layernorm": ("pre-norm LayerNorm", NormConfig("layernorm", "pre")),
    "post-rmsnorm": ("post-norm RMSNorm", NormConfig("rmsnorm", "post")),
    "no-norm": ("no norm", NormConfig("none", "none")),
}

# A run has learned from context when it beats letter frequencies by at least this share.
LEARNED_BELOW = 0.9

RESULTS_FILE = "results.json"
FIGURE_FILE = "demo.png"


@dataclass(frozen=True)
class Outcome:
    """What one variant came to.

    Args:
        name: of the variant and of its run's folder.
        verdict: "learned", "stagnated" (held-out text is predicted less than a tenth better than by byte
            frequencies), "diverged" (loss or gradient no longer finite), or "unfinished".
        bits_per_byte: on held-out text at the end; NaN for a run that did not finish.
        largest_grad_norm: over all steps, before clipping.
        tokens_per_second: median over the steps.
        steps: optimizer steps done.
        losses: training loss of every step in bits per byte.
        diverged_at: the step at which something was no longer finite.
        depth_grad_norms: gradient norm of each block's parameters at initialization, block 1 first.
    """

    name: str
    verdict: str
    bits_per_byte: float
    largest_grad_norm: float
    tokens_per_second: float
    steps: int
    losses: tuple[float, ...]
    depth_grad_norms: tuple[float, ...]
    diverged_at: int | None = None


@dataclass(frozen=True)
class Baselines:
    """Held-out bits per byte without a network: byte frequencies, and xz after reading the training text."""

    unigram: float
    xz: float


def demo_plans(depth: int, steps: int, text: str | None = None, seed: int = 0) -> dict[str, Plan]:
    """The plan of every variant, by name: the same seed, data and settings, and only the norms differ.

    GELU, not SwiGLU: without norms a gated feed-forward squares its input in every block, and 24 blocks overflow
    before the first step; with GELU the explosion can still be seen and drawn.
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


def prepare(folder: Path, plans: Mapping[str, Plan]) -> None:
    """Makes the run's folder of every variant that has none yet. Each run can be repeated or continued by itself.

    Raises:
        DataError, ConfigError, RunError: the text, a setting or the folder can't be used.
    """
    for name, plan in plans.items():
        path = folder / name
        if not (path / CONFIG_FILE).exists():
            create_run(plan, path, ["omninorm", "train", "--resume", str(path)]).folder.close()


def read_outcome(path: Path, depth_grad_norms: Sequence[float], unigram: float) -> Outcome:
    """What the record of a variant's run says."""
    events = read_record(path / RECORD_FILE)
    steps = [event for event in events if event["kind"] == "step"]
    evaluations = [event["bits_per_byte"] for event in events if event["kind"] == "eval"]
    status = final_status(path / RECORD_FILE)
    bits = evaluations[-1] if evaluations and status == "finished" else math.nan
    norms = [event["grad_norm"] for event in events if "grad_norm" in event]
    return Outcome(
        name=path.name,
        verdict=judge(status, bits, unigram),
        bits_per_byte=bits,
        largest_grad_norm=max(norms, key=lambda norm: math.inf if math.isnan(norm) else norm, default=math.nan),
        tokens_per_second=statistics.median(e["clock"]["tokens_per_second"] for e in steps) if steps else math.nan,
        steps=len(steps),
        losses=tuple(event["loss"] / math.log(2.0) for event in steps),
        depth_grad_norms=tuple(depth_grad_norms),
        diverged_at=next((event["step"] for event in events if event["kind"] == "diverged"), None),
    )


def judge(status: str | None, bits: float, unigram: float) -> str:
    """The verdict on a run: see `Outcome`."""
    if status is None:
        return "unfinished"
    if status == "diverged":
        return "diverged"
    return "learned" if bits < LEARNED_BELOW * unigram else "stagnated"


def measure_baselines(corpus: Corpus, eval_bytes: int | None) -> Baselines:
    """Both baselines, on the bytes that the runs are evaluated on."""
    held_out = corpus.held_out[:eval_bytes]
    return Baselines(unigram_bits_per_byte(corpus.train, held_out), xz_bits_per_byte(corpus.train, held_out))


def depth_grad_norms(plan: Plan, data: TokenData) -> list[float]:
    """Gradient norm of each block's parameters on the first batch, before any step; block 1 first."""
    model = build_model(plan.model, plan.train.seed)
    tokens = windows(data.train, plan.train.seed, 1, plan.train.batch_size, plan.train.seq_len)
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    blocks = [[parameter.grad for parameter in block.parameters()] for block in model.blocks]
    return [float(nn.utils.get_total_norm([grad for grad in block if grad is not None])) for block in blocks]


def write_results(folder: Path, outcomes: Sequence[Outcome], baselines: Baselines) -> Path:
    """results.json: every number of the table and the figure. What is not finite is null."""
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
