"""Devices by name, and the errors for devices that cannot be used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from omninorm import device as module
from omninorm.device import find_device, find_devices, widest
from omninorm.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three NVIDIA GPUs as PyTorch would report them, which compute."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(module, "_check_usable", lambda device: None)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


def test_auto_prefers_gpus_and_a_number_names_one(gpus: None) -> None:
    three = [torch.device("cuda", index) for index in range(3)]
    assert find_devices() == find_devices("cuda") == three
    assert find_device("auto") == three[0]
    assert find_devices("cuda:2") == three[2:]
    assert find_devices("cpu") == [torch.device("cpu")]


def test_auto_is_the_cpu_without_a_gpu(no_gpu: None) -> None:
    assert find_devices("auto") == [torch.device("cpu")]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "cuda:99999", "CPU", "cpu:0", "meta"])
def test_an_unknown_name_is_refused(no_gpu: None, name: str) -> None:
    with pytest.raises(ConfigError, match="device must be one of auto, cpu, cuda, cuda:N, mps, got '"):
        find_device(name)


def test_a_missing_gpu_is_named(gpus: None) -> None:
    with pytest.raises(ConfigError, match="must be one of the GPUs that PyTorch sees, cuda:0 to cuda:2, got cuda:3"):
        find_device("cuda:3")
    with pytest.raises(ConfigError, match="device mps is not available, because PyTorch sees no such GPU"):
        find_device("mps")


@pytest.mark.parametrize(
    ("cuda", "words"),
    [(None, "this PyTorch is built for CPUs only. Install a PyTorch with CUDA or ROCm"), ("12.8", "omninorm doctor")],
)
def test_a_build_without_cuda_is_told_from_a_machine_without_gpus(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, cuda: str | None, words: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ConfigError, match=words):
        find_device("cuda")


def test_a_busy_gpu_is_refused_in_one_line(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)

    def busy(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might …")

    monkeypatch.setattr(torch, "zeros", busy)
    with pytest.raises(ConfigError) as caught:
        find_device("cuda")
    assert str(caught.value) == (
        "The device cuda:0 cannot be used: CUDA error: all CUDA-capable devices are busy or unavailable. "
        "Wait until it is free, choose another GPU, or use the device cpu."
    )


def test_float64_is_the_widest_dtype_except_on_apple_gpus() -> None:
    kinds = {kind: widest(SimpleNamespace(type=kind)) for kind in ("cpu", "cuda", "mps")}  # type: ignore[arg-type]
    assert kinds == {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32}
