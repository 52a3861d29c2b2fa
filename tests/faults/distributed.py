"""Faults of data-parallel training, in two processes: replicas that should be equal drift apart.

`helpers.distributed.run_in_processes` runs `train_all`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from faults.architectures import ARCHITECTURES, cross_entropy
from faults.run import quiet
from torch import nn

from omninorm import watch

STEPS, EVERY, BEGINS = 30, 5, 11


@dataclass
class Replica:
    """One process of a data-parallel run; faults replace its model or its clipping."""

    rank: int
    model: nn.Module
    called: nn.Module = field(init=False)
    clip: float = 1.0
    before_update: list[Callable[[int], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.called = self.wrapped = nn.parallel.DistributedDataParallel(self.model)


def healthy(replica: Replica) -> None:
    """Change nothing."""


def without_wrapper(replica: Replica) -> None:
    """The model is called without its DDP wrapper, so gradients are not averaged (a case of TrainCheck)."""
    replica.called = replica.model


def gain_on_one_rank(replica: Replica) -> None:
    """From step 11 on, the gain of one norm is updated on the first rank only."""
    gain = replica.model.blocks[1].ln_1.weight  # type: ignore[union-attr,index]

    def drop(step: int) -> None:
        if replica.rank and step >= BEGINS:
            gain.grad = None

    replica.before_update.append(drop)


def clipped_on_one_rank(replica: Replica) -> None:
    """The second rank clips its gradients harder (BLOOM's case, re-created after TrainCheck)."""
    replica.clip = 0.1 if replica.rank else 1.0


FAULTS: dict[str, Callable[[Replica], None]] = {
    each.__name__: each for each in (healthy, without_wrapper, gain_on_one_rank, clipped_on_one_rank)
}


def train(rank: int, fault: str) -> dict[str, Any]:
    """Train nanoGPT on each rank's own text, and return the alarms and a sum of the weights."""
    architecture = ARCHITECTURES["nanogpt"]
    torch.manual_seed(0)
    replica = Replica(rank, architecture.build(32))
    FAULTS[fault](replica)
    optimizer = torch.optim.AdamW(replica.model.parameters(), lr=3e-3)
    with quiet(), watch(replica.wrapped, optimizer, every=EVERY) as watched:
        dist.barrier()
        for step in range(1, STEPS + 1):
            batch = architecture.task(rank, step, 4, 16)
            loss = cross_entropy(replica.called(batch.inputs), batch.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(replica.model.parameters(), replica.clip)
            for act in replica.before_update:
                act(step)
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
            dist.barrier()  # without the wrapper nothing else keeps the processes at the same step
    weights = sum(float(p.detach().double().sum()) for p in replica.model.parameters())
    alarms = [[a.step, a.severity, a.rule, a.layer] for a in watched.alarms]
    return {"rank": rank, "alarms": alarms, "weights": weights}


def train_all(folder: str) -> None:
    """Train with each fault, and write the results of this rank to a file."""
    rank = dist.get_rank()
    results = {fault: train(rank, fault) for fault in FAULTS}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
