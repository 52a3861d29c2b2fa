"""Finds devices by name, and checks them before anything is computed or written."""

from __future__ import annotations

import re

import torch

from omninorm.errors import ConfigError

AUTO = "auto"
_USE_CPU = "or use the device cpu"


def find_device(name: str = AUTO) -> torch.device:
    """Return the first of the devices that `find_devices` returns for a name."""
    return find_devices(name)[0]


def find_devices(name: str = AUTO) -> list[torch.device]:
    """Return the devices with a name.

    Args:
        name: "auto" for all GPUs that PyTorch sees, or the CPU without a GPU; "cpu"; "cuda" for all NVIDIA or AMD GPUs;
            "cuda:N" for one of them; "mps" for an Apple GPU.

    Raises:
        ConfigError: the name is unknown, or the device is not available or cannot be used.

    Example:
        >>> find_devices("cpu")
        [device(type='cpu')]
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    if name == "cpu" or (name == AUTO and here is None):
        return [torch.device("cpu")]
    kind, number = _parse(name, AUTO if here is None else here.type)
    if here is None or kind not in (AUTO, here.type):
        raise _absent(kind)
    count = torch.accelerator.device_count()
    if number is not None and number >= count:
        known = f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise ConfigError(f"device must be one of the GPUs that PyTorch sees, {known}", name, "choose one of them")
    chosen = range(count) if number is None else [number]
    devices = [torch.device(here.type) if here.type == "mps" else torch.device(here.type, each) for each in chosen]
    _check_usable(devices[0])
    return devices


def _parse(name: str, present: str) -> tuple[str, int | None]:
    """Return the type of the device, and its number or None."""
    found = re.fullmatch(rf"(auto|mps|cuda|{re.escape(present)})|(cuda|{re.escape(present)}):(\d{{1,4}})", name)
    if found is None:
        remedy = "for example --device cuda for a GPU of NVIDIA or AMD"
        raise ConfigError("device must be one of auto, cpu, cuda, cuda:N, mps", f"{name!r:.60}", remedy)
    return found[1] or found[2], None if found[3] is None else int(found[3])


def _absent(kind: str) -> ConfigError:
    remedy = f"run `omninorm doctor` to see what is missing, {_USE_CPU}"
    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        remedy = f"install a PyTorch with CUDA or ROCm, {_USE_CPU}"
        return ConfigError("The device cuda is not available, because this PyTorch is built for CPUs only", "", remedy)
    return ConfigError(f"The device {kind} is not available, because PyTorch sees no such GPU", "", remedy)


def _check_usable(device: torch.device) -> None:
    """Raise ConfigError for a device that is busy or broken."""
    try:
        torch.zeros(1, device=device).add_(1)
        synchronize(device)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n", 1)[0].split())[:160]
        remedy = f"wait until it is free, choose another GPU, {_USE_CPU}"
        raise ConfigError(f"The device {device} cannot be used: {reason.rstrip('.')}", "", remedy) from error


def device_name(device: torch.device) -> str:
    """Return the device with the name of the GPU, such as "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work; for the CPU there is nothing to wait for."""
    if device.type not in ("cpu", torch._C._get_privateuse1_backend_name()):
        torch.accelerator.synchronize(device)


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of a GPU in bytes, or None if it is unknown."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def widest(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype of a device: float64, but float32 on Apple GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64
