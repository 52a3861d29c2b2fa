"""Measures the overhead of `omninorm.watch`: `python benchmarks/watch_overhead.py [--rounds 12] [--json FILE]`.

Four copies of a model are trained: two without a watch, whose ratio is the noise of the measurement, one watched in
steps without a sample, and one watched in sampled steps. In each round every copy takes one step, in random order, on
one thread. The time of a watched step is divided by the mean of the two unwatched steps; the medians over the rounds
are printed. A run with every=10 has nine steps without a sample for each sampled step.

The CPU time of the process is measured, so the time of other processes does not count; they still slow it down through
the caches. With --no-clip the steps do not clip gradients. If they do, the monitor gets the gradient norms from the
clipping.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import omninorm
from omninorm import Thinker, ThinkerConfig

VARIANTS = {"off": None, "unsampled": 1_000_000, "sampled": 1, "off again": None}


def thinker() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """Build a Thinker with 12 blocks of width 256, on 8 windows of 128 bytes."""
    data = torch.randint(0, 256, (8, 129))
    model = Thinker(ThinkerConfig(d_model=256, n_layers=12, n_heads=4, max_seq_len=128))
    return model, lambda model: F.cross_entropy(model(data[:, :-1]).flatten(0, 1), data[:, 1:].flatten())


def small() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """Build a Thinker with 4 blocks of width 128, on 4 windows of 64 bytes; a step takes about 20 ms."""
    data = torch.randint(0, 256, (4, 65))
    model = Thinker(ThinkerConfig(d_model=128, n_layers=4, n_heads=4, max_seq_len=64))
    return model, lambda model: F.cross_entropy(model(data[:, :-1]).flatten(0, 1), data[:, 1:].flatten())


def medium() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """Build a Thinker with 8 blocks of width 192, on 4 windows of 96 bytes; a step takes about 100 ms."""
    data = torch.randint(0, 256, (4, 97))
    model = Thinker(ThinkerConfig(d_model=192, n_layers=8, n_heads=4, max_seq_len=96))
    return model, lambda model: F.cross_entropy(model(data[:, :-1]).flatten(0, 1), data[:, 1:].flatten())


def qwen3() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """Build transformers' Qwen3 with its own norms, 6 layers of width 1024, in bfloat16, on 512 tokens."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=512,
    )
    tokens = torch.randint(0, 4096, (1, 512))
    return Qwen3ForCausalLM(config).to(torch.bfloat16), lambda model: model(input_ids=tokens, labels=tokens).loss


MODELS = {"small": small, "medium": medium, "thinker": thinker, "qwen3": qwen3}


Build = Callable[[], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]]


def stepper(build: Build, every: int | None, clip: bool = True) -> Callable[[], None]:
    """Return a training step of a new model, watched or not: forward, loss, backward, clipping, AdamW."""
    torch.manual_seed(0)
    model, loss_of = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    watched = None if every is None else omninorm.watch(model, optimizer, every=every).open()

    def step() -> None:
        loss = loss_of(model)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if watched is None:
            loss.item()
        else:
            watched.step(loss)

    return step


def measure(build: Build, rounds: int, clip: bool = True) -> dict[str, float]:
    """Return the median seconds of an unwatched step, and the ratios to it."""
    steps = {name: stepper(build, every, clip) for name, every in VARIANTS.items()}
    for step in steps.values():
        step()
        step()
    ratios: dict[str, list[float]] = {"unsampled": [], "sampled": [], "off again": []}
    seconds = []
    for _ in range(rounds):
        taken = {}
        for name in random.sample(list(steps), len(steps)):
            start = time.process_time()
            steps[name]()
            taken[name] = time.process_time() - start
        plain = (taken["off"] + taken["off again"]) / 2
        seconds.append(plain)
        ratios["off again"].append(taken["off again"] / taken["off"])
        for name in ("unsampled", "sampled"):
            ratios[name].append(taken[name] / plain)
    medians = {name: statistics.median(found) for name, found in ratios.items()}
    return {
        "seconds": statistics.median(seconds),
        "unsampled": medians["unsampled"],
        "every=10": 0.9 * medians["unsampled"] + 0.1 * medians["sampled"],
        "every=1": medians["sampled"],
        "noise: off again / off": medians["off again"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--only", choices=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    results = {}
    for name, build in MODELS.items():
        if arguments.only in (None, name):
            results[name] = measure(build, arguments.rounds, not arguments.no_clip)
            text = ", ".join(f"{key} {value:.4f}" for key, value in results[name].items())
            print(f"{name}: {text}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
