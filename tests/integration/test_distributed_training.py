"""DistributedDataParallel and FSDP2 over two processes: the gradients of one process on the whole batch."""

from __future__ import annotations

import pytest
from helpers import distributed_training as training
from helpers.distributed import run_in_processes

pytestmark = pytest.mark.slow  # processes that import torch

NORMS = ["rmsnorm", "layernorm"]


def test_distributed_data_parallel() -> None:
    run_in_processes(2, training.data_parallel, NORMS)


def test_fsdp2() -> None:
    run_in_processes(2, training.fully_sharded, NORMS)


def test_fsdp2_with_norms_in_float32_under_a_bfloat16_policy() -> None:
    run_in_processes(2, training.sharded_in_two_precisions, NORMS)
