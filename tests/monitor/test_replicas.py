"""Replicas whose weights differ are named, and no process waits for one that does not watch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.distributed import run_in_processes
from helpers.distributed_watching import train_all

FAULTY = {
    "no wrapper": (None, 3, "since step 1.", "through its DistributedDataParallel wrapper"),
    "gain": ("blocks.1", 6, "blocks.1 on rank 0 are not those of rank 1, since a step between 3 and 6.", "rank only"),
    "wrapper skipped": (None, 6, "since a step between 3 and 6.", "without the DistributedDataParallel wrapper"),
}
HEALTHY = ("wrapped", "sharded", "marked", "turned off", "one rank watches")


@pytest.fixture(scope="module")
def alarms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the alarms of both ranks for each way to train."""
    folder = tmp_path_factory.mktemp("alarms")
    run_in_processes(2, train_all, [*FAULTY, *HEALTHY], str(folder))
    return {
        how: [json.loads((Path(folder) / f"{how}-{rank}.json").read_text()) for rank in (0, 1)]
        for how in (*FAULTY, *HEALTHY)
    }


@pytest.mark.slow
@pytest.mark.parametrize("how", FAULTY)
def test_differing_replicas_are_named_on_rank_0(how: str, alarms: dict[str, list[list[dict[str, Any]]]]) -> None:
    layer, step, evidence, remedy = FAULTY[how]
    (alarm,) = [alarm for alarm in alarms[how][0] if alarm["severity"] == "fail"]
    assert (alarm["rule"], alarm["layer"]) == ("replicas-differ", layer)
    # At the first sample rank 0 does not know yet whether the other process watches, and does not wait for it.
    assert alarm["step"] in ({1, 3} if step == 3 else {step})
    assert alarm["evidence"].endswith(evidence)
    assert remedy in alarm["remedy"]
    assert alarms[how][1] == []


@pytest.mark.slow
@pytest.mark.parametrize("how", HEALTHY)
def test_equal_and_unwatched_replicas_raise_nothing(how: str, alarms: dict[str, list[list[dict[str, Any]]]]) -> None:
    assert alarms[how] == [[], []]
