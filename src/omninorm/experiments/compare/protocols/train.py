"""The train protocol: held-out bits per byte at the end of a run, divergence and gradient spikes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.factory import CPU, build_cell
from omninorm.experiments.compare.protocols.common import plain, tokens_of
from omninorm.experiments.compare.protocols.undo import measure_undo
from omninorm.experiments.corpus import Corpus, TokenData
from omninorm.experiments.settings import TrainConfig
from omninorm.experiments.train import train

UNIFORM_BITS = 8.0
SPIKE_SIGMA, SPIKE_WINDOW, SPIKE_HISTORY = 7.0, 1000, 32


def measure(cell: Cell, corpus: Corpus, device: torch.device = CPU) -> Measurement:
    """Train the cell's model.

    The outcome has

    - "status", "diverged_at", "largest_grad_norm", "spike_score" (see the function);
    - "bits_per_byte" of the held-out text at the end (None for a diverged run), "initial_bits" before the first step;
    - "score": the final bits per byte, but at most 8, the value of a uniform guess, which is also the score of a
      diverged run (Wortsman et al. 2023, arXiv 2309.14322, use the loss at initialization instead);
    - "losses": the loss of every step in bits per byte;
    - "undo": the result of `measure_undo` on a batch of the held-out text.
    """
    plan = cell.plan
    data = tokens_of(cell, corpus)
    started = time.perf_counter()
    model = build_cell(cell, device=device)
    result = train(model, data, plan.train)
    seconds = time.perf_counter() - started
    initial = result.eval_events[0].bits_per_byte
    finished = result.status == "finished"
    final = result.eval_events[-1].bits_per_byte if finished else math.inf
    outcome = {
        "status": result.status,
        "bits_per_byte": final,
        "initial_bits": initial,
        "score": min(final, UNIFORM_BITS),
        "diverged_at": None if finished else result.steps,
        "largest_grad_norm": result.largest_grad_norm,
        "spike_score": spike_score(result.grad_norms),
        "losses": [loss / math.log(2.0) for loss in result.losses],
        "undo": measure_undo(model, _probe(data, plan.train).to(device)) if finished else None,
    }
    speed = (
        statistics.median(event.tokens_per_second for event in result.step_events) if result.step_events else math.nan
    )
    return Measurement(plain(outcome), plain({"seconds": seconds, "tokens_per_second": speed}))


def _probe(data: TokenData, config: TrainConfig) -> Tensor:
    """Return the first windows of the held-out text, int64 (≤ batch_size, seq_len)."""
    count = min(config.batch_size, len(data.held_out) // config.seq_len)
    return data.held_out[: count * config.seq_len].view(count, config.seq_len).long()


def spike_score(norms: Sequence[float]) -> float:
    """Return the share of steps whose gradient norm is 7 standard deviations above the mean of the last 1,000 steps.

    The first 32 steps never count as spikes.
    """
    spikes = 0
    for at in range(SPIKE_HISTORY, len(norms)):
        before = norms[max(0, at - SPIKE_WINDOW) : at]
        spikes += norms[at] > statistics.fmean(before) + SPIKE_SIGMA * statistics.pstdev(before)
    return spikes / len(norms) if norms else 0.0
