"""The division of GPUs among workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from omninorm.config import NormConfig
from omninorm.errors import RunError
from omninorm.experiments.compare import crew
from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.crew import name_alone, only_visible, usual_workers

CPU, GPUS = torch.device("cpu"), [torch.device("cuda", index) for index in range(2)]
CELL = Cell("init", NormConfig(), 2, 0)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (2**30, 2),
        (5 * 2**30, 8),
        (80 * 2**30, 32),
    ],  # at least one each; 4 each, as a cell takes a little over 1 GiB; cores
)
def test_as_many_workers_as_fit_in_the_memory_of_the_gpus(
    monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    monkeypatch.setattr(crew, "free_memory", lambda device: free)
    assert usual_workers(32, GPUS, [CELL]) == expected
    assert usual_workers(32, [CPU], [CELL]) == 32


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "3,GPU-5a"}, {"CUDA_VISIBLE_DEVICES": "GPU-5a"}),
        ({"HIP_VISIBLE_DEVICES": "2,4"}, {"HIP_VISIBLE_DEVICES": "4"}),
    ],
)
def test_a_worker_sees_its_own_gpu_only(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: dict[str, str]
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert only_visible(GPUS[1]) == expected
    assert only_visible(CPU) == {}
    assert [name_alone(device) for device in (GPUS[1], CPU)] == ["cuda:0", "cpu"]


@pytest.mark.parametrize(
    ("gpus", "device", "workers", "expected"),
    [
        (2, "auto", 8, (0.25, "cuda")),
        (4, "cuda", 3, (1.0, "cuda")),
        (2, "cpu", 8, (0, "cpu")),
        (0, "auto", 8, (0, "cpu")),
    ],
)
def test_runs_on_ray_request_fractions_of_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: str, workers: int, expected: tuple[float, str]
) -> None:
    on_ray = pytest.importorskip("omninorm.experiments.compare.on_ray")
    monkeypatch.setattr(on_ray, "ray", SimpleNamespace(cluster_resources=lambda: {"CPU": 64, "GPU": gpus}))
    assert on_ray.RayEngine(None, workers, 1.0, device)._share(workers) == expected


def test_a_cluster_without_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_ray = pytest.importorskip("omninorm.experiments.compare.on_ray")
    monkeypatch.setattr(on_ray, "ray", SimpleNamespace(cluster_resources=lambda: {"CPU": 64}))
    with pytest.raises(RunError, match="Ray's cluster has no GPU"):
        on_ray.RayEngine(None, 2, 1.0, "cuda")._share(2)
