"""The speed protocol: LayerNorm's time divided by a norm's, for the norm alone, a block and a training step.

In each round both are timed in random order; the result is the median of the ratios over the rounds. A comparison runs
these cells one at a time, after all others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.device import synchronize
from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.factory import CPU, VOCABULARY, build_cell
from omninorm.experiments.compare.protocols.common import plain
from omninorm.experiments.compare.protocols.operations import count_operations
from omninorm.experiments.corpus import Corpus
from omninorm.experiments.optim import build_optimizer
from omninorm.layers import build_norm
from omninorm.placement import enter
from omninorm.thinker import Thinker
from omninorm.timing import OURS, Case, Contestant, paired_ratios, time_case

BASELINE = "layernorm"
SECONDS = 1.5  # the time for each case
_INPUTS = 4
_TORCH = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}
Call = Callable[[int], object]


def measure(cell: Cell, corpus: Corpus, device: torch.device = CPU) -> Measurement:
    """Time the cell's norm and LayerNorm in the same places.

    The outcome has "operations", the number of operations in each norm's forward pass. The clock has "ratios",
    LayerNorm's time over the norm's (the norm is faster if it is above 1), and "microseconds", the norm's times, for

    - "norm" and "norm, torch.nn": forward and backward pass at the model's width;
    - "block": the same for a whole block;
    - "step": a training step with its optimizer.
    """
    started = time.perf_counter()
    torch.manual_seed(cell.seed)
    pairs = {"norm": _norms(cell, True, device), "norm, torch.nn": _norms(cell, False, device)}
    pairs |= {"block": _blocks(cell, device), "step": _steps(cell, device)}
    ratios, micros = {}, {}
    for name, pair in pairs.items():
        if pair is not None:
            inputs = _INPUTS if name.startswith("norm") else 1
            ratios[name], micros[name] = _time(pair, inputs, cell.seed, device)
    kinds = [kind for kind in (cell.norm.normalization, BASELINE) if kind in _TORCH]
    operations = {kind: count_operations(kind) for kind in kinds}
    clock = {"ratios": ratios, "microseconds": micros, "seconds": time.perf_counter() - started}
    return Measurement(plain({"operations": operations}), plain(clock))


def _time(calls: tuple[Call, Call], inputs: int, seed: int, device: torch.device) -> tuple[float, float]:
    """Return LayerNorm's time over the norm's, and the norm's time in microseconds, including the device's work."""
    ours, other = (_finished(call, device) for call in calls)
    contestants = [Contestant(OURS, ours, "ours"), Contestant(BASELINE, other, "other")]
    samples = time_case(Case("speed", contestants, inputs, grad=True), SECONDS, seed=seed)
    ratio = statistics.median(paired_ratios(samples[BASELINE], samples[OURS]))
    return ratio, statistics.median(samples[OURS]) / 1000


def _finished(call: Call, device: torch.device) -> Call:
    def finished(turn: int) -> object:
        result = call(turn)
        synchronize(device)
        return result

    return call if device.type == "cpu" else finished


def _norms(cell: Cell, ours: bool, device: torch.device) -> tuple[Call, Call] | None:
    """Return calls of the two norms alone: omninorm's, or torch.nn's if it has both."""
    plan = cell.plan
    width, rows = plan.model.d_model, plan.train.batch_size * plan.train.seq_len
    xs = [torch.randn(rows, width, device=device, requires_grad=True) for _ in range(_INPUTS)]
    if ours:
        other = replace(cell.norm, normalization=BASELINE, gain_offset=0.0, cast="fp32")
        norms: list[nn.Module] = [build_norm(cell.norm, width), build_norm(other, width)]
    elif cell.norm.normalization in _TORCH:
        norms = [_TORCH[kind](width, eps=cell.norm.norm_eps) for kind in (cell.norm.normalization, BASELINE)]
    else:
        return None
    dy = torch.randn(rows, width, device=device)
    norms = [norm.to(device) for norm in norms]
    return _backward(norms[0], xs, dy), _backward(norms[1], xs, dy)


def _blocks(cell: Cell, device: torch.device) -> tuple[Call, Call] | None:
    """Return calls of the first block of two Thinkers."""
    if cell.model is not None:
        return None
    calls = []
    train = cell.plan.train
    x = torch.randn(train.batch_size, train.seq_len, cell.plan.model.d_model, device=device)
    for norm in (cell.norm, replace(cell.norm, normalization=BASELINE, gain_offset=0.0, cast="fp32")):
        model = build_cell(cell, norm, device)
        assert isinstance(model, Thinker)
        stream = enter(norm, x)
        rotation = model.rotary(0, train.seq_len, None)
        block = model.blocks[0]

        def step(turn: int, block: nn.Module = block, stream: object = stream, rotation: object = rotation) -> None:
            out = block(stream, rotation, None, None)
            (out[0] if isinstance(out, tuple) else out).sum().backward()

        calls.append(step)
    return calls[0], calls[1]


def _steps(cell: Cell, device: torch.device) -> tuple[Call, Call]:
    """Return training steps of two models: forward, backward, optimizer."""
    config = cell.plan.train
    tokens = torch.randint(0, VOCABULARY, (config.batch_size, config.seq_len + 1), device=device)
    calls = []
    for norm in (cell.norm, replace(cell.norm, normalization=BASELINE, gain_offset=0.0, cast="fp32")):
        model = build_cell(cell, norm, device)
        optimizer = build_optimizer(model, replace(config, lr=1e-5))

        def step(turn: int, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        calls.append(step)
    return calls[0], calls[1]


def _backward(norm: nn.Module, xs: Sequence[Tensor], dy: Tensor) -> Call:
    def call(turn: int) -> Tensor:
        x = xs[turn]
        x.grad = None
        y: Tensor = norm(x)
        y.backward(dy)  # type: ignore[no-untyped-call]
        return y.detach()

    return call
