"""The ramp protocol: the largest tolerable learning rate, from one run with a rising learning rate (KEEL)."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.divergence import find_divergence
from omninorm.experiments.compare.factory import CPU, build_cell
from omninorm.experiments.compare.protocols.common import plain, tokens_of
from omninorm.experiments.corpus import Corpus
from omninorm.experiments.evaluate import unigram_bits_per_byte
from omninorm.experiments.settings import learning_rate
from omninorm.experiments.train import train


def measure(cell: Cell, corpus: Corpus, device: torch.device = CPU) -> Measurement:
    """Train with a learning rate that rises linearly from 0 to the cell's `lr` over all steps.

    The outcome has

    - "largest_rate": the learning rate at the last step with progress;
    - "sign": the sign of divergence; None if the run did not diverge, so that "largest_rate" is a lower bound;
    - "losses": the loss of every step in bits per byte.
    """
    plan = cell.plan
    config = replace(plan.train, warmup_steps=plan.train.steps, eval_every=plan.train.steps)
    data = tokens_of(cell, corpus)
    started = time.perf_counter()
    result = train(build_cell(cell, device=device), data, config)
    seconds = time.perf_counter() - started
    losses = [loss / math.log(2.0) for loss in result.losses]
    unigram = unigram_bits_per_byte(corpus.train, corpus.held_out)
    found = find_divergence(losses, config.steps, unigram)
    rate = learning_rate(found.step, config) if found.step else 0.0
    return Measurement(
        plain({"largest_rate": rate, "sign": found.sign, "last_good_step": found.step, "losses": losses}),
        plain({"seconds": seconds}),
    )
