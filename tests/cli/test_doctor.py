"""`omninorm doctor`: what this machine has, and the commands that install what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from omninorm.cli import machine
from omninorm.errors import for_checkout
from omninorm.experiments import provenance
from omninorm.kernels import cpu
from omninorm.kernels.dispatch import backends

# The extras that add to what users can do.
USERS = ("train", "demo", "compare", "interop", "onnx", "ray")


class Gpu:
    """Two GPUs as PyTorch would report them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", total_memory=85 * 10**9, major=9, minor=0, multi_processor_count=132
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: properties.name)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 10 2025\nGCC version: 12\n")
    monkeypatch.setattr(machine, "_NVIDIA", version)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None, list[str]], None]:
    """Sets CUDA_VISIBLE_DEVICES and the files in /dev."""

    def choose(hidden: str | None, devices: list[str]) -> None:
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        (tmp_path / "dev").mkdir()
        for name in devices:
            (tmp_path / "dev" / name).touch()
        monkeypatch.setattr(machine, "_DEVICES", tmp_path / "dev")

    return choose


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path / "none")
    monkeypatch.setattr(machine, "_AMD", tmp_path / "none")


@pytest.fixture
def all_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every optional package and a compiler are installed."""
    monkeypatch.setattr(
        machine, "versions", lambda: {"torch": torch.__version__, **dict.fromkeys(provenance.OPTIONAL, "1")}
    )
    monkeypatch.setattr(machine, "version_of", lambda name: "3.5.0")
    monkeypatch.setattr(machine, "_compiler", lambda: "g++ 12")
    monkeypatch.setattr(cpu, "unavailable", lambda: "")


def missing(facts: dict[str, Any]) -> dict[str, str]:
    return {each["package"]: each["remedy"] for each in facts["missing"]}


def test_json_has_versions_machine_and_back_ends(command) -> None:
    code, out, err = command("doctor", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["memory_gib"] > 0.1
    assert facts["machine"]["operators"] == (None if cpu.unavailable() else cpu.instruction_set())
    assert [each["name"] for each in facts["backends"]] == [backend.name for backend in backends()]
    assert set(facts["gpu"]) == {"runtime", "driver", "devices", "triton", "nccl", "mps"}


def test_a_missing_package_is_listed_with_the_command_that_installs_it(command, monkeypatch) -> None:
    monkeypatch.setitem(provenance.OPTIONAL, "a-package-that-is-not", ("nothing", "demo"))
    code, out, _ = command("doctor")
    assert code == 0
    install = for_checkout('pip install "omninorm[demo]"')
    assert f"a-package-that-is-not (for nothing): {install}" in out
    assert "Nothing is missing" not in out
    assert torch.__version__ in out
    for backend in backends():
        assert f"{backend.name}: {'available' if backend.available else 'unavailable'} ({backend.reason})" in out


def test_nothing_is_missing_if_all_packages_are_there_and_no_gpu(command, all_packages, no_gpu, no_driver) -> None:
    _, out, _ = command("doctor")
    assert out.rstrip().endswith("Nothing is missing. PyTorch sees no GPU, so everything runs on the CPU.")


def test_gpus_are_shown_with_memory_capability_runtime_driver_and_nccl(command, all_packages, gpus, driver) -> None:
    _, out, _ = command("doctor")
    for line in (
        "NVIDIA H100 80GB HBM3, 79.2 GiB, capability 9.0, 132 multiprocessors",
        "CUDA 12.8",
        "NVIDIA 570.86.15",
        "2.27.5",
        "3.5.0",
    ):
        assert line in out
    assert out.count("NVIDIA H100 80GB HBM3, ") >= 2
    assert out.rstrip().endswith("Nothing is missing.")


def test_a_gpu_that_a_cpu_build_of_pytorch_can_not_use_is_missing_pytorch(
    all_packages, no_gpu, driver, monkeypatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    facts = machine.inspect_machine()
    assert "download.pytorch.org/whl/cu" in missing(facts)["PyTorch for GPUs"]


@pytest.mark.parametrize("hidden", [None, ""])
def test_a_driver_that_is_too_old_is_named(all_packages, no_gpu, driver, visible, hidden, monkeypatch) -> None:
    visible(hidden, ["nvidia0"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    facts = machine.inspect_machine()
    assert "update the driver" in missing(facts)["a driver for CUDA 13.0"]
    assert "570.86.15" in missing(facts)["a driver for CUDA 13.0"]


@pytest.mark.parametrize(
    ("hidden", "devices", "words"),
    [
        ("", ["nvidia0"], ["CUDA_VISIBLE_DEVICES=)", "unset CUDA_VISIBLE_DEVICES"]),
        ("7", ["nvidia0"], ["CUDA_VISIBLE_DEVICES=7", "unset CUDA_VISIBLE_DEVICES"]),
        (None, ["nvidiactl"], ["CUDA_VISIBLE_DEVICES is not set", "/dev/nvidia", "container"]),
        (None, ["nvidiactl", "nvidia0"], ["CUDA_VISIBLE_DEVICES is not set", "nvidia-smi", "update the driver", "570"]),
    ],
)
def test_a_hidden_gpu_is_not_blamed_on_a_driver_that_is_new_enough(
    all_packages, no_gpu, driver, visible, monkeypatch, hidden: str | None, devices: list[str], words: list[str]
) -> None:
    visible(hidden, devices)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    (remedy,) = missing(machine.inspect_machine()).values()
    assert "no GPU is visible to this process" in remedy
    assert [word for word in words if word not in remedy] == []
    assert ("update the driver" in remedy) == ("update the driver" in words)


def test_triton_and_nccl_are_missing_on_a_machine_with_gpus(all_packages, gpus, driver, monkeypatch) -> None:
    monkeypatch.setattr(machine, "version_of", lambda name: None if "triton" in name else "1")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert missing(machine.inspect_machine()) == {
        "triton": 'pip install "triton>=3.3"',
        "NCCL": "install a build of PyTorch with NCCL",
    }


@pytest.mark.parametrize("compiler", ["g++ 12", None])
def test_operators_that_were_not_built_are_missing(
    all_packages, no_gpu, no_driver, monkeypatch, compiler: str | None
) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(machine, "_compiler", lambda: compiler)
    facts = machine.inspect_machine()
    assert facts["machine"]["operators"] is None
    assert "--force-reinstall" in missing(facts)["C++ operators"]
    assert ("install a C++ compiler" in missing(facts)["C++ operators"]) == (compiler is None)


def test_the_optional_packages_are_those_of_the_extras() -> None:
    """onnxruntime is only a peer of the benchmark."""
    tomllib = pytest.importorskip("tomllib")
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    needed = [
        re.split(r"[<>=\[; ]", each)[0] for extra in USERS for each in extras[extra] if "python_version" not in each
    ]
    listed = {name.lower() for name in provenance.OPTIONAL}
    assert {name.lower() for name in needed} - {"omninorm"} == listed
    assert {extra for _, extra in provenance.OPTIONAL.values()} == set(USERS)
