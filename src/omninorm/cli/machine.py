"""Facts about this machine: versions, CPU, GPUs and back ends, and what is missing."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from omninorm.bench.config import all_threads
from omninorm.errors import for_checkout
from omninorm.experiments.provenance import OPTIONAL, version_of, versions
from omninorm.kernels import cpu
from omninorm.kernels.dispatch import backends
from omninorm.memory import memory_bytes

_TRITON = ("triton", "pytorch-triton-rocm", "triton-windows")
_CUDA_WHEELS = "pip install torch --index-url https://download.pytorch.org/whl/cu128"
_ROCM_WHEELS = "pip install torch --index-url https://download.pytorch.org/whl/rocm6.4"
_REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir . (in omninorm's source folder)"
# The oldest NVIDIA driver for each major version of CUDA; it runs all minor versions. The source is the table "CUDA
# Toolkit and Minimum Required Driver Version for CUDA Minor Version Compatibility" in CUDA's release notes.
_FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}
# The environment variables that hide GPUs; ROCm also reads CUDA's.
_HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_DEVICES = Path("/dev")
# These files exist if the kernel has loaded the vendor's driver.
_NVIDIA, _AMD = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu")


def inspect_machine() -> dict[str, Any]:
    """Return everything that `omninorm doctor` prints, as JSON values."""
    installed = versions()
    gpu, memory = inspect_gpu(), memory_bytes()
    return {
        "versions": installed,
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "operators": None if cpu.unavailable() else cpu.instruction_set(),
            "cores": all_threads(),
            "threads": torch.get_num_threads(),
            "memory_gib": None if memory is None else round(memory / 2**30, 1),
            "cuda": torch.cuda.is_available(),
            "compiler": _compiler(),
        },
        "gpu": gpu,
        "backends": [backend._asdict() for backend in backends()],
        "missing": list(_missing(installed, gpu)),
    }


def inspect_gpu() -> dict[str, Any]:
    """Return the GPUs that PyTorch sees and the software that they need, as JSON values.

    "runtime" is the platform for which PyTorch was built, such as "CUDA 12.8"; "driver" is the version of the loaded
    kernel driver, or None; "capability" is the compute capability of an NVIDIA GPU, or the architecture of an AMD GPU.
    """
    return {
        "runtime": _runtime(),
        "driver": _driver(),
        "devices": [_device(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
        "triton": next((version for name in _TRITON if (version := version_of(name)) is not None), None),
        "nccl": _nccl(),
        "mps": torch.backends.mps.is_available(),
    }


def _device(index: int) -> dict[str, Any]:
    properties: Any = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": getattr(properties, "gcnArchName", capability) if torch.version.hip else capability,
        "processors": properties.multi_processor_count,
    }


def _runtime() -> str | None:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else None


def _driver() -> str | None:
    """Return the version of the NVIDIA or AMD kernel driver, or None if neither is loaded."""
    try:
        if _NVIDIA.exists():
            words = _NVIDIA.read_text(encoding="utf-8", errors="replace").splitlines()[0].split()
            return (
                f"NVIDIA {next((word for word in words if word[:1].isdigit() and '.' in word), 'of unknown version')}"
            )
        if _AMD.exists():
            version = _AMD / "version"
            return f"amdgpu {version.read_text(encoding='utf-8').strip() if version.exists() else platform.release()}"
    except (OSError, IndexError):
        return "of unknown version"
    return None


def _nccl() -> str | None:
    """Return the version of NCCL (RCCL on AMD), or None if PyTorch was built without it or sees no GPU."""
    if not (torch.cuda.is_available() and torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    version: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _missing(installed: dict[str, str | None], gpu: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield what is missing: the package, its purpose, and the command or step that installs it."""
    for name, (purpose, extra) in OPTIONAL.items():
        if installed.get(name) is None:
            yield {"package": name, "purpose": purpose, "remedy": for_checkout(f'pip install "omninorm[{extra}]"')}
    if cpu.unavailable():
        remedy = _REBUILD if _compiler() else f"install a C++ compiler, then {_REBUILD}"
        yield {"package": "C++ operators", "purpose": "fast norms on the CPU", "remedy": remedy}
    elif not _compiler():
        yield {"package": "C++ compiler", "purpose": "torch.compile", "remedy": "install g++ or clang++"}
    if gpu["devices"]:
        if gpu["triton"] is None:
            yield {"package": "triton", "purpose": "fast norms on the GPU", "remedy": 'pip install "triton>=3.3"'}
        if len(gpu["devices"]) > 1 and gpu["nccl"] is None:
            remedy = "install a build of PyTorch with NCCL"
            yield {"package": "NCCL", "purpose": "training on several GPUs", "remedy": remedy}
    elif gpu["driver"] is not None and gpu["runtime"] is None:
        remedy = _CUDA_WHEELS if gpu["driver"].startswith("NVIDIA") else _ROCM_WHEELS
        yield {"package": "PyTorch for GPUs", "purpose": f"the GPU (driver {gpu['driver']})", "remedy": remedy}
    elif gpu["runtime"] is not None and gpu["driver"] is not None:
        yield _unused_gpu(gpu["runtime"], gpu["driver"])


def _unused_gpu(runtime: str, driver: str) -> dict[str, str]:
    """Return why PyTorch sees no GPU although a driver is loaded, and what to do."""
    update = f"update the driver, or install a PyTorch that supports driver {driver}"
    if _is_too_old(driver, runtime):
        return {"package": f"a driver for {runtime}", "purpose": "the GPU", "remedy": update}
    hidden = [f"{name}={os.environ[name]}" for name in _HIDING if name in os.environ]
    devices = "nvidia[0-9]*" if driver.startswith("NVIDIA") else "kfd"
    here = any(_DEVICES.glob(devices))
    state = ", ".join(hidden) or "CUDA_VISIBLE_DEVICES is not set"
    fact = f"no GPU is visible to this process ({state}{'' if here else f'; there is no /dev/{devices}'})"
    if hidden:
        remedy = f"{fact}: unset {' and '.join(each.split('=')[0] for each in hidden)}, or name a GPU of this machine"
    elif not here:
        remedy = f"{fact}: give the container or job access to the GPU, such as docker run --gpus all"
    else:
        remedy = f"{fact}: check the GPU with {'nvidia-smi' if 'nvidia' in devices else 'rocminfo'}, or {update}"
    return {"package": "a visible GPU", "purpose": "training on the GPU", "remedy": remedy}


def _is_too_old(driver: str, runtime: str) -> bool:
    """Return whether an NVIDIA driver is known to be too old for a version of CUDA."""
    version, cuda = re.match(r"NVIDIA (\d+)\.", driver), re.match(r"CUDA (\d+)\.", runtime)
    return version is not None and cuda is not None and int(version[1]) < _FIRST_DRIVERS.get(int(cuda[1]), 0)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _compiler() -> str | None:
    """Return the version line of the C++ compiler with which setup.py would build the operators, or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            printed = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace").stdout
            return next(iter(printed.splitlines()), shlex.join(command))
    return None
