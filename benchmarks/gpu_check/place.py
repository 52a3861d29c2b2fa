"""The device of the check: functions that wait for it, time it, and count the waits of the host."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

import omninorm
from omninorm.kernels import gpu

SIMULATED = "simgpu"
OURS = "omninorm"
AUTO = "auto"


def prepare(device: str) -> None:
    """Install the simulated accelerator if it was chosen, and set the random seed."""
    if device == SIMULATED:
        from helpers.simulated_accelerator import install

        install()
    torch.manual_seed(0)
    # The graph of a compiled function is used for several backward passes, which must not overwrite its buffers.
    from torch._functorch import config

    config.donated_buffer = False


def our_backends(device: str) -> list[str]:
    """Return omninorm's back ends to measure, our kernels first; on the simulated accelerator only the reference."""
    if device == SIMULATED or (device == "cpu" and not gpu.INTERPRETED):
        return ["reference"]
    known = {each.name for each in omninorm.backends() if each.available}
    return [name for name in ("triton", "torch") if name in known and (device == "cuda" or name == "triton")]


def model_backends(device: str) -> list[str]:
    """Return omninorm's back ends for whole models; Triton's interpreter is too slow for them."""
    return [AUTO, "triton"] if device == "cuda" else ["reference"]


def using(backend: str) -> AbstractContextManager[object]:
    """Return a context in which a back end computes the norms, or the one that omninorm chooses."""
    return nullcontext() if backend == AUTO else omninorm.use_backend(backend)


def compiles(device: str) -> bool:
    """Return whether torch.compile can trace the device's tensors; the simulated ones are a subclass that it can't."""
    return device != SIMULATED


def has_graphs(device: str) -> bool:
    """Return whether the device has CUDA graphs."""
    return device == "cuda"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def elapsed(call: Callable[[], object], device: str) -> float:
    """Return the seconds that the device needs for a call."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def wall(call: Callable[[], object], device: str) -> float:
    """Return the seconds until the host and the device have finished a call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


@contextmanager
def counting_waits(device: str) -> Iterator[Callable[[], int]]:
    """Count the waits of the host inside the block; yield a function that returns the count so far."""
    if device == SIMULATED:
        from helpers.simulated_accelerator import counting, counts

        with counting():
            before = counts.waits.total()
            yield lambda: counts.waits.total() - before
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _debug_waits(device, "warn")
        try:
            yield lambda: sum("synchronizing CUDA" in str(each.message) for each in caught)
        finally:
            _debug_waits(device, "default")


def _debug_waits(device: str, mode: str) -> None:
    if device == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


def move(module: torch.nn.Module, device: str) -> torch.nn.Module:
    if device == SIMULATED:
        from helpers.simulated_accelerator import to_simulated

        return to_simulated(module)
    return module.to(device)


def describe(device: str) -> dict[str, Any]:
    """Return the facts about the machine on which results depend."""
    import platform

    from omninorm.cli.machine import inspect_gpu
    from omninorm.experiments.provenance import git_commit

    found = inspect_gpu()
    name = torch.cuda.get_device_name() if device == "cuda" else device
    if device == "cpu" and gpu.INTERPRETED:
        name = "Triton's interpreter"
    return {
        "name": name,
        "gpu": found,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "omninorm": omninorm.__version__,
        "commit": git_commit(),
        "backends": our_backends(device),
    }
