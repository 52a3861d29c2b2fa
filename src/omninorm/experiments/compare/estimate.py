"""Estimated duration of a comparison, from one timed step of each model size on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from omninorm.device import synchronize
from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.factory import CPU, build_cell
from omninorm.experiments.compare.protocols.speed import SECONDS as TIMED
from omninorm.experiments.memory import fitting, step_does_not_fit

_TIMED_CASES = 4
_START_SECONDS = 4.0  # a worker imports torch and reads the text


def estimate_seconds(cells: Iterable[Cell], workers: int, device: torch.device = CPU) -> float:
    """Return the estimated duration in seconds, from a timed single-threaded step of each model size.

    Raises:
        ConfigError: a step does not fit in the memory of the device.
    """
    todo = list(cells)
    if not todo:
        return 0.0
    seconds: dict[tuple[object, ...], float] = {}
    total = 0.0
    for cell in todo:
        if cell.protocol == "speed":
            total += workers * (_TIMED_CASES * TIMED + _START_SECONDS)  # timed cells run one at a time
            continue
        size = _size(cell)
        if size not in seconds:
            seconds[size] = _step_seconds(cell, device)
        total += seconds[size] * _steps(cell)
    return total / min(workers, len(todo)) + _START_SECONDS


def longest_first(cells: Iterable[Cell]) -> list[Cell]:
    """Sort cells by duration, longest first, so that all workers finish at about the same time."""
    return sorted(cells, key=lambda cell: cell.depth * _steps(cell) * cell.plan.train.tokens_per_step, reverse=True)


def _steps(cell: Cell) -> float:
    """Return the duration in training steps; an evaluation's forward pass counts as a third of a step."""
    config = cell.plan.train
    return 1 if cell.protocol == "init" else config.steps + 2 * (config.eval_bytes or 0) / config.tokens_per_step / 3


def _size(cell: Cell) -> tuple[object, ...]:
    model, train = cell.plan.model, cell.plan.train
    return cell.depth, model.d_model, model.n_heads, model.feed_forward, train.batch_size, train.seq_len


def _step_seconds(cell: Cell, device: torch.device) -> float:
    """Return the shorter of two forward and backward passes; the optimizer's time is negligible."""
    plan = cell.plan
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fitting(step_does_not_fit(plan.train, device)):
            model = build_cell(cell, device=device)
            tokens = torch.zeros((plan.train.batch_size, plan.train.seq_len + 1), dtype=torch.long, device=device)
            taken = []
            for _ in range(2):
                started = time.perf_counter()
                loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()  # type: ignore[no-untyped-call]
                synchronize(device)
                taken.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return min(taken) * plan.train.grad_accumulation
