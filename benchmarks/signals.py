"""Records every signal in a healthy run and in a faulty one: writes docs/signals/results.json, for docs/signals.md.

python benchmarks/signals.py        # half a minute; then `make figures` draws the figures
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from faults.run import Case, prepare, quiet  # noqa: E402
from helpers.faulty_runs import FAULTY, HEALTHY_TWIN, Outcome, Recipe, Training, at, run  # noqa: E402

from omninorm import NormConfig, watch  # noqa: E402
from omninorm.monitor import History  # noqa: E402
from omninorm.record.files import write_file  # noqa: E402

OUT = ROOT / "docs" / "signals" / "results.json"
LAYERNORM, DYT = (Recipe(steps=80, norm=NormConfig(kind)) for kind in ("layernorm", "dyt"))


def shift(training: Training, step: int) -> None:
    training.noise = 3.0 if step >= 40 else 0.0


@torch.no_grad()
def saturate(training: Training) -> None:
    for name, parameter in training.model.named_parameters():
        if name.endswith("alpha"):
            parameter.fill_(8.0)


@torch.no_grad()
def enlarge_gain(training: Training) -> None:
    training.model.blocks[1].around_attention.norm.weight[:2] *= 50.0


@torch.no_grad()
def enlarge_embedding(training: Training) -> None:
    training.model.embedding.weight.mul_(4.0)


TWIN = replace(HEALTHY_TWIN, steps=80)
DEEP = replace(FAULTY["post-norm, 24 blocks, no warm-up"].recipe, norm=NormConfig())
# For each title: the faulty run, the healthy run with which it is compared, and the signals that are shown.
CASES: dict[str, tuple[Recipe, Recipe, tuple[str, ...]]] = {
    "one layer's weights × 100 at step 50": (
        FAULTY["weights × 100 at step 50"].recipe,
        TWIN,
        ("stream_rms", "stream_max", "stream_median", "norm_rms", "dead_units"),
    ),
    "a block silent from step 50 on": (
        FAULTY["silent block"].recipe,
        TWIN,
        ("branch_ratio", "attention_ratio", "feed_forward_ratio", "angle"),
    ),
    "queries growing from step 21 on": (
        FAULTY["attention logits grow"].recipe,
        TWIN,
        ("attention_logit", "attention_entropy"),
    ),
    "norms with ε = 0.1": (FAULTY["norm ε of 0.1"].recipe, replace(TWIN, steps=40), ("eps_share",)),
    "a mean of 3 in every embedding from step 40 on": (replace(LAYERNORM, fault=shift), LAYERNORM, ("mean_share",)),
    "α = 8": (replace(DYT, prepare=saturate), DYT, ("saturation",)),
    "the embedding × 4 at step 50": (replace(TWIN, fault=at(50, enlarge_embedding)), TWIN, ("logz", "logz_mean")),
    "post-norm, 24 blocks, no warm-up": (
        FAULTY["post-norm, 24 blocks, no warm-up"].recipe,
        DEEP,
        ("stream_grad", "grad_norm"),
    ),
    "random bytes in steps 60 to 79": (
        FAULTY["20 corrupted batches"].recipe,
        HEALTHY_TWIN,
        ("noise_scale", "adam_ratio"),
    ),
    "two gains of a norm × 50 at step 50": (
        replace(TWIN, fault=at(50, enlarge_gain)),
        TWIN,
        ("gain_max", "gain_ratio"),
    ),
    "a norm's gains frozen at 0": (FAULTY["gain frozen at 0"].recipe, replace(TWIN, steps=40), ("gain_small",)),
    "a learning rate 30 times too high": (
        FAULTY["learning rate 30 × too high"].recipe,
        TWIN,
        ("weight_rms", "update_ratio"),
    ),
    "Adam's ε above the gradients": (
        FAULTY["Adam's ε above the gradients"].recipe,
        replace(TWIN, steps=40),
        ("adam_eps_ratio",),
    ),
}


def experts() -> dict[str, dict]:
    """Return the signals of a small Mixtral whose third router collapses, and of the same run without the fault."""
    healthy, faulty = (mixture(fault) for fault in (None, "router collapses"))
    title = "a router that collapses at step 31"
    return {
        signal: {"title": title, "healthy": series(healthy, signal), "ill": series(faulty, signal)}
        for signal in ("expert_load", "expert_least")
    }


def mixture(fault: str | None) -> History:
    """Train a mixture-of-experts model of the fault tests, with a fault or without."""
    with quiet():
        training = prepare(Case("mixtral", 0, fault=fault))
        with watch(training.model, training.optimizers, every=5) as watched:
            training.run(watched)
    return watched.history


def series(history: History, signal: str) -> dict[str, list]:
    """Return the sampled steps and the values along the signal's axis, rounded to four digits."""
    samples = [sample for sample in history.samples if signal in sample.signals]
    return {
        "steps": [sample.step for sample in samples],
        "values": [[_rounded(value) for value in sample.signals[signal]] for sample in samples],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def main() -> None:
    torch.set_num_threads(1)
    healthy: dict[Recipe, Outcome] = {}
    found = {}
    for title, (faulty, reference, signals) in CASES.items():
        if reference not in healthy:
            healthy[reference] = run(reference)
        outcome = run(faulty)
        print(f"{title}: {', '.join(sorted({alarm.rule for alarm in outcome.alarms})) or 'no alarm'}", flush=True)
        for signal in signals:
            found[signal] = {
                "title": title, "healthy": series(healthy[reference].history, signal),
                "ill": series(outcome.history, signal),
            }  # fmt: skip
    found |= experts()
    OUT.parent.mkdir(exist_ok=True)
    write_file(OUT, (json.dumps(found, separators=(",", ":")) + "\n").encode())
    print(f"Results: {OUT.relative_to(ROOT)}. Draw the figures with make figures.")


if __name__ == "__main__":
    main()
