"""The init protocol: the residual stream and the gradients of each block before the first step."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.device import widest
from omninorm.errors import ConfigError
from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.factory import CPU, build_cell
from omninorm.experiments.compare.protocols.common import plain, tokens_of
from omninorm.experiments.corpus import Corpus, windows
from omninorm.experiments.evaluate import to_device
from omninorm.monitor.model_map.structure import find_structure


def measure(cell: Cell, corpus: Corpus, device: torch.device = CPU) -> Measurement:
    """Run one forward and backward pass on the first batch.

    The outcome has, block 1 first:

    - "stream_rms": the RMS of each block's output;
    - "grad_norms": the gradient norm of each block's parameters;
    - "growth": (ln RMS of the last output − ln RMS of the first)/(blocks − 1), None for one block or non-finite values.
    """
    plan = cell.plan
    config = plan.train
    started = time.perf_counter()
    model = build_cell(cell, device=device)
    blocks = [block.module for block in find_structure(model).blocks]
    if not blocks:
        remedy = "keep the blocks in an nn.ModuleList or an nn.Sequential, or do not use the protocol init"
        raise ConfigError(f"The protocol init needs a model with blocks, but {cell.model} has none", "", remedy)
    batch = windows(tokens_of(cell, corpus).train, config.seed, 1, config.batch_size, config.seq_len)
    tokens = to_device(batch, device)
    streams: list[float] = []

    def look(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        stream = output[0] if isinstance(output, tuple) else output  # the placement "residual" returns two tensors
        streams.append(float(stream.detach().to(widest(device)).square().mean().sqrt()))

    for block in blocks:
        block.register_forward_hook(look)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    norms = [
        float(nn.utils.get_total_norm([p.grad.to(widest(device)) for p in block.parameters() if p.grad is not None]))
        for block in blocks
    ]
    outcome = {"loss": float(loss.detach()), "stream_rms": streams, "grad_norms": norms, "growth": growth(streams)}
    return Measurement(plain(outcome), plain({"seconds": time.perf_counter() - started}))


def growth(values: list[float]) -> float:
    """Return the mean change of the logarithm from one value to the next."""
    if len(values) < 2 or not all(math.isfinite(value) and value > 0 for value in values):
        return math.nan
    return (math.log(values[-1]) - math.log(values[0])) / (len(values) - 1)
