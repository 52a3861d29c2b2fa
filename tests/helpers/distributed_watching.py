"""Trainings of two processes under watch, for `helpers.distributed.run_in_processes`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.watched_models import Decoder, some_tokens, token_loss
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from omninorm.monitor import watch
from omninorm.monitor.checks import replicas

STEPS, EVERY, FAULTY = 12, 3, 5


def train(how: str, folder: str) -> None:
    """Train a Decoder for 12 steps on different batches, and write the alarms of each rank to a file."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    inner = Decoder()
    model: nn.Module = inner if how == "no wrapper" else DistributedDataParallel(inner)
    if how == "sharded":
        model = fully_shard(inner, mesh=init_device_mesh("cpu", (2,)))
    if how == "marked":
        inner.blocks[1].norm2.weight.allreduce = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched = watch(model, optimizer, every=EVERY, replicas=how != "turned off")
    if how != "one rank watches" or rank == 0:
        watched.open()
    dist.barrier()
    for step in range(1, STEPS + 1):
        called = inner if how == "wrapper skipped" and step >= FAULTY else model
        loss = token_loss(called, some_tokens(100 * step + rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if how in ("gain", "marked", "turned off", "one rank watches") and step >= FAULTY and rank == 1:
            with torch.no_grad():
                inner.blocks[1].norm2.weight += 1e-3
        if watched.record:
            watched.step(loss)
        dist.barrier()  # without a wrapper nothing else keeps the processes at the same step
    watched.close()
    alarms = [alarm.to_record() for alarm in watched.alarms]
    (Path(folder) / f"{how}-{rank}.json").write_text(json.dumps(alarms))


def train_all(ways: list[str], folder: str) -> None:
    replicas.PATIENCE = 60.0  # on a busy machine
    for how in ways:
        train(how, folder)
        dist.barrier()
