"""Synthetic benchmark results for tests of verdicts and figures."""

from __future__ import annotations

from typing import Any

from omninorm.bench.config import BenchConfig
from omninorm.bench.process import new_result
from omninorm.timing import OURS

PLACE = {"dtype": "fp32", "rows": 512, "width": 1024, "threads": 1, "allocator": "raised"}
_ROLES = {"clone": "limit", "torch.add": "limit", "torch.nn.LayerNorm": "other"}


def measurement(case: str, ratios: dict[str, float], **place: Any) -> dict[str, Any]:
    """Return a worker's measurement with the given ratios of our time to the others'; ours is 1 ms."""
    times = {OURS: 1e6, **{name: 1e6 / ratio for name, ratio in ratios.items()}}
    roles = {OURS: "ours", **{name: _ROLES.get(name, "peer") for name in ratios}}
    contestants = {
        name: {"role": roles[name], "ns": {"median": ns, "q1": ns, "q3": ns}, "gb_per_s": 4e6 / ns}
        for name, ns in times.items()
    }
    paired = {name: {"median": ratio, "q1": ratio, "q3": ratio} for name, ratio in ratios.items()}
    return {"case": case, "rounds": 7, "contestants": contestants, "ratios": paired, **PLACE, **place}


def result(*measurements: dict[str, Any], kept: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {**new_result(BenchConfig()), "measurements": list(measurements), "kept": list(kept)}
