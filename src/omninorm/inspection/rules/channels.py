"""Rules for dead and outlier channels: rows and columns of a matrix."""

from __future__ import annotations

from collections.abc import Iterator

from omninorm.inspection.channels import DEAD, Channels
from omninorm.inspection.findings import Finding
from omninorm.inspection.measure import TensorStats
from omninorm.inspection.rules.tensor import about

OUTLIER = 10.0
"""Largest channel RMS / median channel RMS."""


def channel_findings(tensor: TensorStats) -> Iterator[Finding]:
    """Yield findings about the channels of one matrix; another rule reports a matrix that is all zero."""
    if not tensor.is_matrix or tensor.rms == 0.0 or tensor.rows is None or tensor.columns is None:
        return
    for axis, channels in (("row", tensor.rows), ("column", tensor.columns)):
        tokens = axis == "row" and tensor.place.kind in ("embedding", "head")
        if channels.dead:
            yield _untrained(tensor, channels) if tokens else _dead(tensor, axis, channels)
        # A row of an embedding or a head belongs to one token, and tokens may differ in size; a column belongs to all.
        if not tokens and channels.ratio is not None and channels.ratio > OUTLIER:
            yield _outlier(tensor, axis, channels, channels.ratio)


def _dead(tensor: TensorStats, axis: str, channels: Channels) -> Finding:
    evidence = (
        f"{channels.dead} of {channels.count} {axis}s ({_some(channels)}) are dead:"
        f" their RMS is below {DEAD:g} × the matrix's RMS of {tensor.rms:.3g}"
    )
    remedy = "these channels carry no signal: prune them, or look for a slice that was never filled"
    return about(tensor, "warn", f"dead-{axis}s", evidence, remedy, channels.dead / channels.count)


def _untrained(tensor: TensorStats, channels: Channels) -> Finding:
    which = f"{channels.dead} of {channels.count} rows ({_some(channels)})"
    evidence = f"{which} are zero: these tokens or positions were never trained"
    remedy = "normal for padding; inputs should not contain them"
    return about(tensor, "note", "untrained-rows", evidence, remedy, channels.dead / channels.count)


def _outlier(tensor: TensorStats, axis: str, channels: Channels, ratio: float) -> Finding:
    evidence = (
        f"{axis} {channels.largest} has {ratio:.3g} × the median {axis}'s RMS of {channels.median:.3g}"
        f" (threshold {OUTLIER:g})"
    )
    remedy = "quantize with a scale per channel along this axis, or keep the channel in 16 bits"
    return about(tensor, "warn", f"outlier-{axis}", evidence, remedy, ratio)


def _some(channels: Channels) -> str:
    more = channels.dead - len(channels.dead_first)
    return ", ".join(map(str, channels.dead_first)) + (f" and {more} more" if more else "")
