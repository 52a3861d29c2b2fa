"""Compact numbers for the page: heat maps with two bytes per cell, and curves thinned without losing extremes."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from omninorm.report.story import Series, Values
from omninorm.report.values import LARGEST

NOTHING = -3e38
"""Marks a cell without a value. No signal that is drawn as a map can be negative."""
BUCKETS = 700


def pack(columns: Iterable[Values]) -> str:
    """Encode the values as base64 of bfloat16, rounded to nearest: all low bytes, then all high bytes, by column.

    bfloat16 has the range of float32, NaN and infinities, and seven bits of mantissa: the decoded value is within 0.4 %
    over all 76 decades, without a separate scale.
    """
    flat = array("f")
    for values in columns:
        try:
            flat.fromlist(values)  # type: ignore[arg-type]
        except TypeError:
            flat.fromlist([NOTHING if value is None else value for value in values])
    if sys.byteorder == "big":
        flat.byteswap()
    # Add half of the last place to all numbers at once. A carry out of the mantissa raises the exponent, as it should.
    total = int.from_bytes(flat.tobytes(), "little") + int.from_bytes(b"\x00\x80\x00\x00" * len(flat), "little")
    raw = total.to_bytes(4 * len(flat) + 1, "little")[:-1]
    return base64.b64encode(raw[2::4] + raw[3::4]).decode()


def unpack(packed: str) -> list[float | None]:
    """Decode as the page does; for tests, and as the definition of the format."""
    raw = base64.b64decode(packed)
    half = len(raw) // 2
    values = array(
        "f", bytes(byte for low, high in zip(raw[:half], raw[half:], strict=True) for byte in (0, 0, low, high))
    )
    if sys.byteorder == "big":
        values.byteswap()
    return [None if value < -2.9e38 and not math.isinf(value) else value for value in values]


def curve(series: Series, logarithmic: bool = False) -> dict[str, Any]:
    """Return a curve's points {x, y}, and {bad}: the steps at which it was not finite or beyond 1e300.

    A long curve keeps the smallest and the largest value of each of 700 buckets of steps, in order, so that a spike of
    a single step remains; {mean} then has the buckets' middles and means. Non-finite steps are thinned to one a bucket.
    """
    steps, values = series
    bad: list[int] = []
    # A quick test: the sum is large or NaN if any value is.
    if not sum(map(abs, values)) <= LARGEST:
        bad = [step for step, value in zip(steps, values, strict=True) if not abs(value) <= LARGEST]
        steps, values = _drawable(series)
    kept = _extremes(values)
    x, y = [steps[index] for index in kept], [float(f"{values[index]:.5g}") for index in kept]
    stride = -(-len(bad) // BUCKETS) or 1
    means = _means(steps, values) if len(kept) < len(values) else []
    return {"x": x, "y": y, "bad": bad[::stride], "log": logarithmic and _spans(y), "mean": means}


def _drawable(series: Series) -> Series:
    pairs = [(step, value) for step, value in zip(*series, strict=True) if abs(value) <= LARGEST]
    return Series([step for step, _ in pairs], [value for _, value in pairs])


def _extremes(values: Sequence[float]) -> list[int]:
    """Return the indices of each bucket's smallest and largest value, and of the first and the last value."""
    if len(values) <= 2 * BUCKETS:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for number in range(BUCKETS):
        start = number * len(values) // BUCKETS
        bucket = values[start : (number + 1) * len(values) // BUCKETS]
        kept |= {start + bucket.index(min(bucket)), start + bucket.index(max(bucket))}
    return sorted(kept)


def _means(steps: Sequence[int], values: Sequence[float]) -> list[list[float]]:
    """Return [[step, mean], …] of the buckets."""
    points = []
    for number in range(BUCKETS):
        start, end = number * len(values) // BUCKETS, (number + 1) * len(values) // BUCKETS
        points.append([steps[(start + end) // 2], float(f"{math.fsum(values[start:end]) / (end - start):.5g}")])
    return points


def _spans(values: Sequence[float]) -> bool:
    """Return whether positive values span so wide a range that a linear axis would hide most of them."""
    return bool(values) and min(values) > 0 and max(values) > 8 * min(values)
