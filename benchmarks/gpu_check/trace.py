"""Profiles two training steps, one sampled by a watch: writes a Chrome trace, and returns the slowest kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

import omninorm
from gpu_check import place
from gpu_check.items import Item
from gpu_check.sizes import Sizes
from gpu_check.training import first_model, names, trained

_TOP = 25


def items(device: str, sizes: Sizes, options: Any) -> Iterator[Item]:
    path = options.json.with_name(f"{options.json.stem}-trace.json.gz")
    yield Item("training", 60.0, lambda: traced(device, sizes, path))


def traced(device: str, sizes: Sizes, path: Path) -> dict[str, Any]:
    """Write the trace; return the kernels that take the most time on the device."""
    model = trained(names(device)[0], first_model(sizes, device), device, sizes, False)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with omninorm.watch(model.model, model.optimizer, every=2) as watched:
        for _ in range(4):
            watched.step(model.step())
        place.synchronize(device)
        with profile(activities=activities) as found:
            for _ in range(2):
                watched.step(model.step())
            place.synchronize(device)
    found.export_chrome_trace(str(path))
    rows = sorted(found.key_averages(), key=lambda each: _microseconds(each, device), reverse=True)[:_TOP]
    top = [{"name": each.key[:120], "calls": each.count, "us": round(_microseconds(each, device), 1)} for each in rows]
    size = path.stat().st_size
    return {"file": path.name, "bytes": size, "top": top, "summary": f"{path.name}, {size / 2**20:.1f} MiB"}


def _microseconds(row: Any, device: str) -> float:
    """Return the time of an operator without the operators that it calls, on the GPU if there is one."""
    return float(row.self_device_time_total if device == "cuda" else row.self_cpu_time_total)
