"""Runs functions in several processes, which communicate with gloo.

The processes are forks of a server that has imported torch, which takes seconds.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from helpers import fork_server


def run_in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call a module's function in `count` processes; an exception of one of them is raised here."""
    fork_server.context()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        torch.multiprocessing.start_processes(
            _run, (count, meeting, function, arguments), nprocs=count, start_method="forkserver"
        )


def _run(rank: int, count: int, meeting: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    try:
        function(*arguments)
        dist.barrier()  # keep the group alive until all processes are done
    finally:
        dist.destroy_process_group()
