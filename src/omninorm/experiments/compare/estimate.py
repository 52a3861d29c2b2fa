"""How long a comparison will take, from a step of each size of model, measured here and now."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.factory import build_cell
from omninorm.experiments.compare.protocols.speed import SECONDS as TIMED

_TIMED_CASES = 4
_START_SECONDS = 4.0  # of a worker: it imports torch and reads the text


def estimate_seconds(cells: Iterable[Cell], workers: int) -> float:
    """The time that cells will take, seconds. A step of one model of each size is timed, on one thread."""
    todo = list(cells)
    if not todo:
        return 0.0
    seconds: dict[tuple[object, ...], float] = {}
    total = 0.0
    for cell in todo:
        if cell.protocol == "speed":
            total += workers * (_TIMED_CASES * TIMED + _START_SECONDS)  # alone on the machine
            continue
        size = _size(cell)
        if size not in seconds:
            seconds[size] = _step_seconds(cell)
        total += seconds[size] * _steps(cell)
    return total / min(workers, len(todo)) + _START_SECONDS


def longest_first(cells: Iterable[Cell]) -> list[Cell]:
    """In an order in which workers end together."""
    return sorted(cells, key=lambda cell: cell.depth * _steps(cell) * cell.plan.train.tokens_per_step, reverse=True)


def _steps(cell: Cell) -> float:
    """Training steps that take as long; an evaluation's forward pass is a third of one."""
    config = cell.plan.train
    return 1 if cell.protocol == "init" else config.steps + 2 * (config.eval_bytes or 0) / config.tokens_per_step / 3


def _size(cell: Cell) -> tuple[object, ...]:
    model, train = cell.plan.model, cell.plan.train
    return cell.depth, model.d_model, model.n_heads, model.feed_forward, train.batch_size, train.seq_len


def _step_seconds(cell: Cell) -> float:
    """The shorter of two steps, forward and backward; the optimizer's part is small."""
    plan = cell.plan
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build_cell(cell)
        tokens = torch.zeros((plan.train.batch_size, plan.train.seq_len + 1), dtype=torch.long)
        taken = []
        for _ in range(2):
            started = time.perf_counter()
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            taken.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return min(taken) * plan.train.grad_accumulation
