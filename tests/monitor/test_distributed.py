"""Two processes train one model with DDP or FSDP2: each writes its own record, both see averaged gradients."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.waiting import PATIENCE
from helpers.watched_models import Decoder, some_tokens, token_loss

from omninorm.record.jsonl import read_history

TESTS = Path(__file__).parents[1]
STEPS = 3
SCRIPT = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from helpers.watched_models import *
from omninorm.monitor import watch

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
for how in ("plain", "accumulates", "sharded"):
    torch.manual_seed(0)
    model = Decoder()
    if how == "sharded":
        for block in model.modules():
            if isinstance(block, torch.nn.ModuleList):
                for each in block:
                    fully_shard(each, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if how == "sharded":
        with torch.no_grad():  # an evaluation, which leaves gathered parameters behind
            model(some_tokens(0))
    with watch(model, optimizer, every=1, folder=f"{folder}/{how}", rules=[]) as watched:
        for step in range(1, %d + 1):
            if how == "accumulates":
                with model.no_sync():
                    token_loss(model, some_tokens(100 * step + 10 + rank)).backward()
            loss = token_loss(model, some_tokens(100 * step + rank))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
dist.destroy_process_group()
"""


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.mark.slow
def test_two_processes_record_global_norms_and_their_own_shards(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT % STEPS, str(rank), port, str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    check(tmp_path / "plain", averaged_norms(accumulates=False))
    check(tmp_path / "accumulates", averaged_norms(accumulates=True))
    check(tmp_path / "sharded", averaged_norms(accumulates=False), "FSDPDecoder")


def check(folder: Path, wanted: list[float], name: str = "Decoder") -> None:
    """Two records of one training, with these gradient norms."""
    assert sorted(path.name for path in folder.iterdir()) == ["record-rank1.jsonl", "record.jsonl"]
    records = [read_history(folder / name) for name in ("record.jsonl", "record-rank1.jsonl")]
    assert [record[0]["rank"] for record in records] == [0, 1]
    assert [record[0]["world_size"] for record in records] == [2, 2]
    assert records[0][0]["model"] == name
    steps, samples = ([[e for e in record if e["kind"] == kind] for record in records] for kind in ("steps", "sample"))
    norms = [[event["grad_norm"][0] for event in events] for events in steps]
    assert norms[0] == norms[1]
    assert not [event for record in records for event in record if event["kind"] == "alarm"]
    assert norms[0] == pytest.approx(wanted, rel=1e-4)
    by_group = [[event["signals"]["grad_norm"] for event in events] for events in samples]
    assert len(by_group[0]) == STEPS
    assert by_group[0] == by_group[1]
    assert steps[0][0]["loss"] != steps[1][0]["loss"]
    streams = [[event["signals"]["stream_rms"] for event in events] for events in samples]
    assert streams[0] != streams[1]


def averaged_norms(accumulates: bool) -> list[float]:
    """The same training in one process."""
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for step in range(1, STEPS + 1):
        for rank in (0, 1):
            (token_loss(model, some_tokens(100 * step + rank)) / 2).backward()
            if accumulates:
                (token_loss(model, some_tokens(100 * step + 10 + rank)) / 2).backward()
        norms.append(math.hypot(*(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)))
        optimizer.step()
        optimizer.zero_grad()
    return norms
