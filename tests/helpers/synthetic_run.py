"""Synthetic records of healthy and faulty runs of any size, with every signal.

To write one by hand: PYTHONPATH=tests python -m helpers.synthetic_run FOLDER [blocks] [samples] [scene]
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omninorm.record import Record
from omninorm.record.signals import SIGNALS

HOSTILE = "<script>document.title='pwned'</script>"

LIMITS = [
    {"signal": "attention_logit", "rule": "attention-logits", "warn": 1e3, "fail": 1e4, "below": False},
    {"signal": "attention_entropy", "rule": "attention-entropy", "warn": 0.03, "fail": None, "below": True},
    {"signal": "stream_max", "rule": "headroom", "warn": 6550.4, "fail": 65438.5, "below": False, "dtype": "float16"},
    {"signal": "gain_ratio", "rule": "gain-drift", "warn": 10.0, "condition": "and 3 times the first value"},
]

# Typical size of each signal, and the exponent of its change over depth.
_TYPICAL = {
    "stream_rms": (0.9, 1.5), "stream_max": (12.0, 1.5), "stream_median": (0.5, 1.5), "branch_ratio": (0.4, -1.5),
    "attention_ratio": (0.2, -1.0), "feed_forward_ratio": (0.3, -1.0), "angle": (0.3, -0.6), "attention_logit": (8.0, 0.8),
    "attention_entropy": (0.7, -0.6), "dead_units": (0.01, 1.0), "norm_rms": (0.9, 1.5), "eps_share": (1e-6, -3.0),
    "mean_share": (0.01, 0.5), "saturation": (0.1, 0.3), "logz": (6.0, 0), "logz_mean": (4.5, 0), "stream_grad": (2e-5, 0.7),
    "grad_norm": (0.15, -0.7), "noise_scale": (180.0, 0), "gain_max": (1.3, 0.2), "gain_ratio": (1.2, 0.2), "gain_small": (0.001, 0),
    "expert_load": (0.6, 0.1), "expert_least": (0.7, -0.2), "weight_rms": (0.02, 0.1), "update_ratio": (1.5e-3, -0.2), "adam_ratio": (1.05, 0.2), "adam_eps_ratio": (900.0, -0.5),
}  # fmt: skip


def run(
    path: Path,
    *,
    blocks: int = 12,
    samples: int = 60,
    every: int = 10,
    scene: str = "healthy",
    prefix: str = "blocks",
    kinds: str = "watch",
    seed: int = 0,
) -> Path:
    """Write a record and return its folder.

    Args:
        path: the folder, created if needed.
        scene: "healthy", "warnings", "logits" (attention logits grow in a late block), "nan" (a NaN in the forward pass) or
            "hostile" (every text contains markup and control characters).
        prefix: the beginning of the blocks' names.
        kinds: "watch", "train" (step and eval events alone) or "both".
        seed: of the noise.
    """
    path.mkdir(parents=True, exist_ok=True)
    record = Record(path / "record.jsonl")
    for event in events(blocks, samples, every, scene, prefix, kinds, seed):
        record.append(event)
    record.close()
    return path


def events(
    blocks: int, samples: int, every: int, scene: str, prefix: str, kinds: str, seed: int = 0
) -> Iterator[dict[str, Any]]:
    chance, noise = random.Random(7 + seed), random.Random(11 + seed)
    watch, last = kinds != "train", samples * every
    header = head(blocks, every, prefix, scene)
    if kinds != "watch":
        yield {"kind": "eval", "step": 0, "bits_per_byte": 8.0}
    if watch:
        yield header
    for step in range(every, last + 1, every):
        progress = step / last
        chunk = [curves(s, last, scene, noise) for s in range(step - every + 1, step + 1)]
        if kinds != "watch":
            for offset, (loss, norm, rate) in enumerate(chunk):
                clock = {"seconds": 0.1, "tokens_per_second": 40_000.0}
                number = step - every + 1 + offset
                yield {"kind": "step", "step": number, "loss": loss, "grad_norm": norm, "lr": rate, "clock": clock}
            yield {"kind": "eval", "step": step, "bits_per_byte": 2 + 6 * math.exp(-4 * progress)}
        if watch:
            names = ("loss", "grad_norm", "lr")
            values = {name: list(each) for name, each in zip(names, zip(*chunk, strict=True), strict=True)}
            yield {"kind": "steps", "step": step, "first": step - every + 1, **values}
            if step == every:
                yield {"kind": "seen", "step": step, "placement": "pre", "not_seen": not_seen(scene)}
            signals = sample(header, progress, scene, chance)
            worst = [f"{name}.attention.query.weight" for name in header["groups"]]
            bounds = {"loss": [None, round(3.9 + 5 * math.exp(-6 * progress), 4)], "logz": [-4.0, 16.0]}
            yield {"kind": "sample", "step": step, "signals": signals, "worst": {"adam_ratio": worst}, "bounds": bounds}
            if alarms := alarms_at(step, last, every, blocks, scene, prefix):
                yield {"kind": "alarms", "step": step, "alarms": alarms}
            if scene == "nan" and step == crisis(last, every):
                layer = f"{prefix}.{blocks // 2}.feed_forward"
                yield {"kind": "nonfinite", "step": step, "phase": "forward", "layer": layer, "value": "nan"}
    if kinds != "watch":
        yield {"kind": "diverged" if scene == "nan" else "finished", "step": last}
    elif watch:
        yield {"kind": "end", "step": last, "reason": HOSTILE if scene == "hostile" else "done"}


def crisis(last: int, every: int) -> int:
    """The sampled step at which a faulty run fails."""
    return max(every, int(0.6 * last) // every * every)


def head(blocks: int, every: int, prefix: str, scene: str) -> dict[str, Any]:
    names = [f"{prefix}.{index}" for index in range(blocks)]
    norms = [
        {"name": f"{name}.{place}_norm", "kind": "RMSNorm", "eps": 1e-6, "block": index, "frozen": False, "ours": True}
        for index, name in enumerate(names)
        for place in ("attention", "feed_forward")
    ]
    norms.append({"name": "norm", "kind": "RMSNorm", "eps": 1e-6, "block": None, "frozen": False, "ours": True})
    return {
        "kind": "watch", "step": 0, "format": 1, "every": every, "rank": 0, "world_size": 1,
        "started": "2026-03-01T10:00:00+00:00", "versions": {"omninorm": "0.1.0", "torch": "2.13.0"},
        "model": HOSTILE if scene == "hostile" else "Thinker", "parameters": 25_000_000, "blocks": names, "norms": norms,
        "groups": [*names, "embedding", "norm", "head"], "attentions": [f"{name}.attention" for name in names],
        "feed_forwards": [f"{name}.feed_forward" for name in names], "optimizer": "AdamW", "adam_eps": 1e-8,
        "limits": LIMITS, "config": {"batch size": 32, "data": {"name": HOSTILE if scene == "hostile" else "bible"}},
    }  # fmt: skip


def curves(step: int, last: int, scene: str, chance: random.Random) -> tuple[float, float, float]:
    """Loss, gradient norm and learning rate of a step."""
    loss = 3.3 + 5 * math.exp(-6 * step / last) + chance.gauss(0, 0.06)
    norm = math.exp(chance.gauss(0, 0.2)) * (0.4 + 2 * math.exp(-9 * step / last))
    warmup = max(1, last // 20)
    rate = 3e-3 * min(step / warmup, 0.55 + 0.45 * math.cos(math.pi * step / last))
    late = step - crisis(last, 1)
    if scene == "logits" and late > 0:
        growth = 12 * late / last
        loss, norm = loss + 0.25 * growth**2 + chance.random() * growth * 0.4, norm * math.exp(growth)
    if scene == "nan" and late >= 0:
        loss = norm = math.nan
    return round(loss, 5), round(norm, 5), round(rate, 8)


def sample(header: dict[str, Any], progress: float, scene: str, chance: random.Random) -> dict[str, list[float | None]]:
    sizes = {axis: len(header[f"{axis}s"]) for axis in ("block", "norm", "group")} | {"run": 1}
    unseen = not_seen(scene)
    seen = {name: signal for name, signal in SIGNALS.items() if name not in unseen}
    return {name: _row(name, sizes[signal.axis], progress, scene, chance) for name, signal in seen.items()}


def _row(name: str, size: int, progress: float, scene: str, chance: random.Random) -> list[float | None]:
    typical, slope = _TYPICAL[name]
    share = name in (
        "angle",
        "attention_entropy",
        "expert_load",
        "dead_units",
        "saturation",
        "gain_small",
        "mean_share",
        "eps_share",
    )
    row: list[float | None] = []
    for index in range(size):
        depth = index / max(1, size - 1)
        wave = 0.4 * math.sin(5 * progress + 3 * depth) + 0.8 * math.exp(-8 * progress)
        value = typical * math.exp(slope * depth + wave + chance.gauss(0, 0.06))
        value *= _fault(name, depth, progress, scene)
        row.append(float(f"{min(value, 1.0) if share else value:.4g}"))
    if name == "gain_small":
        return [0.0 for _ in row]
    return [None if name == "mean_share" and index % 2 else value for index, value in enumerate(row)]


def _fault(name: str, depth: float, progress: float, scene: str) -> float:
    late = progress - 0.6
    if scene == "logits" and late > -0.3:
        near = math.exp(-(((depth - 0.75) / 0.12) ** 2))
        strength = {
            "attention_logit": 14.0,
            "stream_max": 5.0,
            "stream_grad": 9.0,
            "grad_norm": 8.0,
            "attention_ratio": 3.0,
        }
        fall = {"attention_entropy": -7.0}
        return math.exp((late + 0.3) * near * (strength | fall).get(name, 0.0))
    if scene == "nan" and late >= 0:
        hit = depth >= 0.5 and name in ("stream_rms", "stream_max", "branch_ratio", "norm_rms")
        everywhere = name in (
            "logz",
            "logz_mean",
            "stream_grad",
            "grad_norm",
            "weight_rms",
            "update_ratio",
            "noise_scale",
        )
        return math.nan if hit or everywhere else math.inf if name == "adam_ratio" and depth > 0.8 else 1.0
    return 1.0


def not_seen(scene: str) -> dict[str, str]:
    reasons = {"saturation": "no norm of the model is a DyT or Derf"}
    if scene != "healthy":
        reasons["noise_scale"] = "the batches have a single example" if scene != "hostile" else HOSTILE
    return reasons


def alarm(
    step: int, severity: str, rule: str, layer: str | None, evidence: str, remedy: str, source: str
) -> dict[str, Any]:
    values = {"step": step, "severity": severity, "rule": rule, "layer": layer}
    return {**values, "evidence": evidence, "remedy": remedy, "source": source}


def alarms_at(step: int, last: int, every: int, blocks: int, scene: str, prefix: str) -> list[dict[str, Any]]:
    late = crisis(last, every)
    layer = f"{prefix}.{int(0.75 * (blocks - 1))}"
    qk = "try qk-norm, or a third of the learning rate"
    table: dict[str, dict[int, list[dict[str, Any]]]] = {
        "warnings": {
            late: [alarm(late, "warn", "loss-spike", None, "the loss rose to 5.31, 6.8 σ above its mean of 128 steps", "nothing, if it recovers; else look at the batch", "OLMo-core")],
            last: [alarm(last, "warn", "dead-units", layer, "11 % of the feed-forward's units were silent for 5 samples", "a smaller learning rate or a smoother activation", "omninorm")],
        },
        "logits": {
            late // 2 // every * every: [alarm(late // 2 // every * every, "warn", "attention-logits", layer, f"largest attention logit of {layer} passed 1e3", qk, "Wortsman et al. 2023, table 2")],
            late: [
                alarm(late, "fail", "attention-logits", layer, f"the attention logits of {layer} passed 1e4 and went on growing for 5 samples", qk, "Wortsman et al. 2023, table 2"),
                alarm(late, "warn", "attention-entropy", layer, "attention entropy fell to 0.04 of its maximum", qk, "omninorm"),
            ],
            late + 4 * every: [alarm(late + 4 * every, "warn", "gradient-spike", None, "the gradient norm rose to 14, 7.9 σ above its mean", "clip gradients at 1", "OLMo-core")],
            late + 6 * every: [alarm(late + 6 * every, "fail", "unrecovered-spike", None, "the loss was 2.1 times its mean for 5 steps running", "go back to the checkpoint before step " + str(late), "llm-foundry")],
        },
        "nan": {late: [alarm(late, "fail", "non-finite", f"{prefix}.{blocks // 2}.feed_forward", "a NaN came out of the forward pass", "look at this batch and at fp16 headroom", "")]},
        "hostile": {
            late: [alarm(late, "fail", HOSTILE, HOSTILE, f"{HOSTILE} and </script><script>document.title='pwned'</script>", "<!-- \u2028 \x1b[31m red", "<img src=x onerror=\"document.title='pwned'\">")],
        },
    }  # fmt: skip
    return table.get(scene, {}).get(step, [])


if __name__ == "__main__":
    folder, blocks, samples, scene = [*sys.argv[1:], *("48", "10000", "logits")[len(sys.argv) - 2 :]]
    print(run(Path(folder), blocks=int(blocks), samples=int(samples), scene=scene))
