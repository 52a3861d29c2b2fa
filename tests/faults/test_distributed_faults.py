"""Faults of data-parallel training with two processes: replicas that drift apart must be reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from faults.distributed import BEGINS, EVERY, train_all
from helpers.distributed import run_in_processes

from omninorm.monitor import default_rules

RULE = "replicas-differ"
pytestmark = pytest.mark.slow
needs_rule = pytest.mark.skipif(RULE not in {rule.name for rule in default_rules()}, reason=f"there is no rule {RULE}")
Results = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Train with all faults in two processes; return a function from a fault to the results of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_in_processes(2, train_all, str(folder))
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return lambda fault: [results[fault] for results in ranks]


def test_healthy_replicas_stay_equal_and_raise_no_fail(both_ranks: Results) -> None:
    results = both_ranks("healthy")
    assert results[0]["weights"] == results[1]["weights"]
    assert not [alarm for result in results for alarm in result["alarms"] if alarm[1] == "fail" or alarm[2] == RULE]


@pytest.mark.parametrize("fault", ["without_wrapper", "gain_on_one_rank", "clipped_on_one_rank"])
def test_faults_make_replicas_drift_apart(both_ranks: Results, fault: str) -> None:
    results = both_ranks(fault)
    assert results[0]["weights"] != results[1]["weights"]


@needs_rule
@pytest.mark.parametrize(
    ("fault", "begins", "samples"),
    [("without_wrapper", 1, 2), ("clipped_on_one_rank", 1, 1), ("gain_on_one_rank", BEGINS, 1)],
)
def test_replicas_that_differ_are_reported_by_the_next_sample(
    both_ranks: Results, fault: str, begins: int, samples: int
) -> None:
    """In its first two samples rank 0 does not wait for a process that it has not heard of."""
    steps = [alarm[0] for result in both_ranks(fault) for alarm in result["alarms"] if alarm[2] == RULE]
    assert steps
    assert begins <= min(steps) <= begins + samples * EVERY
