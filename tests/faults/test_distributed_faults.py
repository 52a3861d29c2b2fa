"""Faults of data-parallel training with two processes: replicas that drift apart must be reported."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.distributed import BEGINS, EVERY
from helpers.waiting import PATIENCE

from omninorm.monitor import default_rules

TESTS = Path(__file__).parents[1]
RULE = "replicas-differ"
pytestmark = pytest.mark.slow
needs_rule = pytest.mark.skipif(RULE not in {rule.name for rule in default_rules()}, reason=f"there is no rule {RULE}")


def both_ranks(fault: str) -> list[dict[str, Any]]:
    """Return the results of both ranks."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "faults.distributed", str(rank), port, fault],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [errors for _, errors in outputs]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_healthy_replicas_stay_equal_and_raise_no_fail() -> None:
    results = both_ranks("healthy")
    assert results[0]["weights"] == results[1]["weights"]
    assert not [alarm for result in results for alarm in result["alarms"] if alarm[1] == "fail" or alarm[2] == RULE]


@pytest.mark.parametrize("fault", ["without_wrapper", "gain_on_one_rank", "clipped_on_one_rank"])
def test_faults_make_replicas_drift_apart(fault: str) -> None:
    results = both_ranks(fault)
    assert results[0]["weights"] != results[1]["weights"]


@needs_rule
@pytest.mark.parametrize(
    ("fault", "begins", "samples"),
    [("without_wrapper", 1, 2), ("clipped_on_one_rank", 1, 1), ("gain_on_one_rank", BEGINS, 1)],
)
def test_replicas_that_differ_are_reported_by_the_next_sample(fault: str, begins: int, samples: int) -> None:
    """In its first two samples rank 0 does not wait for a process that it has not heard of."""
    steps = [alarm[0] for result in both_ranks(fault) for alarm in result["alarms"] if alarm[2] == RULE]
    assert steps
    assert begins <= min(steps) <= begins + samples * EVERY
