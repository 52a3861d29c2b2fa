"""A server process that imports torch and omninorm once; tests run in forks of it."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_PRELOADED = [
    "omninorm.cli.app", "omninorm.cli.train", "omninorm.cli.progress", "omninorm.experiments", "omninorm.report",
    "omninorm.monitor", "safetensors.torch", "tokenizers", "torch._dynamo", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
]  # fmt: skip


def context() -> ForkServerContext:
    """Return the start method of the processes; the server starts with the first one."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    return server
