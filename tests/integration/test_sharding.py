"""DTensors over two and four processes: with rows or features sharded, results and gradients equal one process's."""

from __future__ import annotations

import pytest
from helpers import distributed_sharding as sharding
from helpers.distributed import run_in_processes
from torch.distributed.tensor import Replicate, Shard


@pytest.mark.slow
def test_rows_of_a_batch_or_a_sequence_or_replicated() -> None:
    run_in_processes(2, sharding.sharded_norms, (2,), [Shard(0)], [Shard(1)], [Replicate()])


def test_features() -> None:
    run_in_processes(2, sharding.sharded_norms, (2,), [Shard(2)])


@pytest.mark.slow
def test_rows_and_features() -> None:
    run_in_processes(4, sharding.sharded_norms, (2, 2), [Shard(0), Shard(2)], [Shard(2), Shard(1)])


@pytest.mark.slow
def test_partial_sums_extreme_rows_and_errors() -> None:
    run_in_processes(2, sharding.others)


@pytest.mark.slow
def test_pytorchs_styles_of_tensor_and_sequence_parallel() -> None:
    run_in_processes(2, sharding.parallel_styles)
