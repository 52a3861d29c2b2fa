"""Devices and back ends of the processes under torchrun."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from omninorm.device import find_devices
from omninorm.errors import ConfigError
from omninorm.experiments import processes as module
from omninorm.experiments.processes import Processes, SilentExit, joined, own_device

CPU = torch.device("cpu")


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(module, "find_devices", lambda name: gpus if name != "cpu" else find_devices(name))
    assert [own_device("auto", number) for number in (0, 1)] == gpus
    assert own_device("cpu", 7) == CPU
    with pytest.raises(ConfigError, match="need a GPU each, and this machine has 2, got 3 processes"):
        own_device("cuda", 2)
    with pytest.raises(ConfigError, match="need a GPU each, got the device cuda:1 for all"):
        own_device("cuda:1", 0)
    # If several processes have the same error, only one reports it.
    for name, number in (("cuda:1", 1), ("cuda", 3)):
        with pytest.raises(SilentExit):
            own_device(name, number)


@pytest.mark.parametrize(("device", "backends", "chosen"), [("auto", "cpu:gloo,cuda:nccl", [1]), ("cpu", "gloo", [])])
def test_gpus_exchange_by_nccl_and_the_host_by_gloo(
    monkeypatch: pytest.MonkeyPatch, device: str, backends: str, chosen: list[int]
) -> None:
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    gpus = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(module, "find_devices", lambda name: gpus if name != "cpu" else find_devices(name))
    started: list[str] = []
    indices: list[int] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", indices.append)
    monkeypatch.setattr(dist, "init_process_group", started.append)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(Processes, "largest", lambda self, value: value)
    with joined("ddp", device) as processes:
        assert processes == Processes(3, 4, "ddp", gpus[1] if chosen else CPU)
    assert (started, indices) == ([backends], chosen)
