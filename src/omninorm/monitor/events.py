"""The events of a watch in record.jsonl, as dictionaries."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from omninorm.monitor.history import Facts, History, Sample, Step
from omninorm.monitor.sample_builder import has_gradients
from omninorm.monitor.stats_buffer import Row
from omninorm.monitor.writer import rank, short, world_size
from omninorm.record.signals import Limit

FORMAT = 1


def watch_event(facts: Facts, limits: Iterable[Limit], done: int) -> dict[str, Any]:
    """Return the first event: the facts, the rules' limits, the process and the versions. `done` is the number of steps
    done before."""
    from omninorm import __version__

    return {
        "kind": "watch",
        "step": done,
        "format": FORMAT,
        "rank": rank(),
        "world_size": world_size(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"omninorm": __version__, "torch": torch.__version__},
        "limits": [limit._asdict() for limit in limits],
        **asdict(facts),
    }


def steps_event(steps: Sequence[Step], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the curves of all steps since the last sample, with None for unknown values, unlike NaN."""
    norms = [step.grad_norm if has_gradients(row) else None for step, row in zip(steps, rows, strict=True)]
    curves = {"loss": [row.loss for row in rows], "grad_norm": norms, "lr": [step.lr for step in steps]}
    return {"kind": "steps", "step": steps[-1].step, "first": steps[0].step, **curves}


def seen_event(sample: Sample, history: History, reasons: Mapping[str, str]) -> dict[str, Any]:
    """Return what the first sample showed: placement, dtype, padding, and the reasons for missing signals."""
    placement = {"placement": history.placement, "placement_reason": history.placement_reason}
    others = {"dtype": history.dtype, "padding": history.padding, "not_seen": reasons}
    return {"kind": "seen", "step": sample.step, **placement, **others}


def sample_event(sample: Sample, bounds: Mapping[str, tuple[float | None, float | None]]) -> dict[str, Any]:
    """Return a sample's signals, and the current bounds of the rules that have moving ones."""
    return {
        "kind": "sample",
        "step": sample.step,
        "signals": {name: short(values) for name, values in sample.signals.items()},
        "worst": sample.worst,
        "bounds": {name: short(limits) for name, limits in bounds.items()},
    }
