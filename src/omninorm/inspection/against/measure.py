"""Measures how two parts of the same shape differ, in one pass over their values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omninorm.inspection.against.parts import Part
from omninorm.inspection.quantize import absmax_error
from omninorm.record.tensors import FLOATS, bits

# The relative spacing of each type. The largest rounding error is half of it, the largest truncation error all of it.
_SPACING = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
_TINIEST = {"F16": 2.0**-24}
_ODD_ROW = 0.5  # a relative error of a row that quantization to three or more bits does not explain


@dataclass
class PairStats:
    """Statistics of two parts. Their values include the offsets that the models add.

    - error is ‖b − a‖ / ‖a‖; expected is the error that quantization explains.
    - correlation is Pearson's, or None if a part is constant.
    - scale is the s that minimizes ‖b − s·a‖, and scaled_error the remaining ‖b − s·a‖ / ‖b‖.
    - beyond counts the values that differ by more than rounding explains, and odd_rows the rows of a quantized matrix
      with a relative error of at least one half.
    - grids are the types to which the values of one part were rounded.
    """

    numel: int
    equal: bool = True
    a_zero: bool = False
    b_zero: bool = False
    a_constant: bool = False
    b_constant: bool = False
    a_bad: int = 0
    b_bad: int = 0
    error: float = 0.0
    max_abs: float = 0.0
    correlation: float | None = None
    scale: float = 1.0
    scaled_error: float = 0.0
    beyond: int = 0
    odd_rows: int = 0
    expected: float = 0.0
    grids: dict[str, bool] = field(default_factory=lambda: {"BF16": True, "F16": True})

    @property
    def grid(self) -> str | None:
        """The coarser type to which one part was rounded before it was stored, if that explains the difference."""
        return next((name for name, fits in self.grids.items() if fits), None) if self.beyond else None


def is_quantized(dtype: str) -> bool:
    """Return whether a type is not one of the usual floating-point types."""
    return dtype not in FLOATS


def precision(dtype: str) -> int:
    """Return the bits of a quantized value: 4 for Q4_K, MLX4, IQ4_XS and MXFP4, and for float8, which is as coarse."""
    if dtype.startswith("F8"):
        return 4
    return max(1, min(bits(dtype), 8))


class _Sums:
    """Running sums in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.a = self.b = self.aa = self.bb = self.ab = self.dd = 0.0

    def add_equal(self, values: Tensor) -> None:
        """Add values that are the same in both parts."""
        total, squares = float(values.sum(dtype=torch.float64)), float(values.double().square().sum())
        self.n += values.numel()
        self.a, self.b = self.a + total, self.b + total
        self.aa, self.bb, self.ab = self.aa + squares, self.bb + squares, self.ab + squares

    def add(self, a: Tensor, b: Tensor) -> None:
        a, b = a.double().flatten(), b.double().flatten()
        difference = b - a
        self.n += a.numel()
        self.a += float(a.sum())
        self.b += float(b.sum())
        self.aa += float(a @ a)
        self.bb += float(b @ b)
        self.ab += float(a @ b)
        self.dd += float(difference @ difference)

    def correlation(self) -> float | None:
        variances = (self.aa - self.a**2 / self.n, self.bb - self.b**2 / self.n)
        smallest = 1e-12 * max(self.aa, self.bb, 1e-300)
        if min(variances) <= smallest:
            return None
        return (self.ab - self.a * self.b / self.n) / math.sqrt(variances[0] * variances[1])


def measure_pair(a: Part, b: Part) -> PairStats:
    """Read both parts once, some rows at a time.

    Raises:
        RunError: a file is damaged.
    """
    stats, sums = PairStats(a.shape[0] * a.shape[1]), _Sums()
    ends = _Ends()
    for left, right in zip(a.chunks(), b.chunks(), strict=True):
        left, right = left + a.offset, right + b.offset
        ends.add(left, right)
        left, right = _without_bad(left, right, stats)
        if torch.equal(left, right):
            sums.add_equal(left)
            continue
        stats.equal = False
        _compare(left, right, a, b, stats)
        sums.add(left, right)
    ends.finish(stats)
    _finish(stats, sums, a, b)
    return stats


def tolerance(a: Tensor, b: Tensor, first: Part, second: Part, at_least: float = 2.0**-22) -> Tensor:
    """Return the largest differences that rounding explains: of the stored values, and of those with the offset added.

    Args:
        a, b: values with the offset added.
        first, second: their parts.
        at_least: the smallest relative spacing of values.
    """
    size = torch.maximum(a.abs(), b.abs())
    if first.offset or second.offset:
        size = torch.maximum(size, torch.maximum((a - first.offset).abs(), (b - second.offset).abs())).clamp(min=1.0)
    dtypes = [each for each in (first.tensor.dtype, second.tensor.dtype) if each in _SPACING]
    spacing = max((_SPACING[each] for each in dtypes), default=2.0**-23)
    return size * max(spacing, at_least) + max((_TINIEST.get(each, 1e-38) for each in dtypes), default=1e-38)


def _without_bad(a: Tensor, b: Tensor, stats: PairStats) -> tuple[Tensor, Tensor]:
    bad = [~torch.isfinite(each) for each in (a, b)]
    counts = [int(each.sum()) for each in bad]
    stats.a_bad += counts[0]
    stats.b_bad += counts[1]
    both = bad[0] | bad[1]
    return (a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)) if any(counts) else (a, b)


def _compare(a: Tensor, b: Tensor, first: Part, second: Part, stats: PairStats) -> None:
    difference = (b - a).abs()
    stats.max_abs = max(stats.max_abs, float(difference.max()))
    quantized = [each.tensor.dtype for each in (first, second) if is_quantized(each.tensor.dtype)]
    if not quantized:
        stats.beyond += int((difference > tolerance(a, b, first, second)).sum())
        for name, fits in stats.grids.items():
            stats.grids[name] = fits and _rounded_to(name, a, b, first, second)
        return
    fine = a if is_quantized(second.tensor.dtype) else b
    width = min(map(precision, quantized))
    stats.expected += absmax_error(fine, width)
    rows = fine.double().square().sum(1)
    if width > 2:
        stats.odd_rows += int(((difference.double().square().sum(1) > _ODD_ROW**2 * rows) & (rows > 0)).sum())


def _rounded_to(name: str, a: Tensor, b: Tensor, first: Part, second: Part) -> bool:
    """Return whether the difference is explained if one of the parts was rounded to this type."""
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[name]
    stored = (a - first.offset, b - second.offset)
    if not any(torch.equal(each, each.to(dtype).to(each.dtype)) for each in stored):
        return False
    return bool(((b - a).abs() <= tolerance(a, b, first, second, _SPACING[name]) + _TINIEST.get(name, 0.0)).all())


class _Ends:
    """The smallest and largest values of both parts."""

    def __init__(self) -> None:
        self.low, self.high = [math.inf, math.inf], [-math.inf, -math.inf]

    def add(self, *parts: Tensor) -> None:
        for i, values in enumerate(parts):
            low, high = values.aminmax()
            self.low[i], self.high[i] = min(self.low[i], float(low)), max(self.high[i], float(high))

    def finish(self, stats: PairStats) -> None:
        stats.a_zero, stats.b_zero = (self.low[i] == self.high[i] == 0.0 for i in (0, 1))
        stats.a_constant, stats.b_constant = (self.low[i] == self.high[i] for i in (0, 1))


def _finish(stats: PairStats, sums: _Sums, a: Part, b: Part) -> None:
    if not sums.n:
        return
    stats.error = math.sqrt(sums.dd / sums.aa) if sums.aa > 0.0 else (0.0 if sums.dd == 0.0 else math.inf)
    stats.correlation = 1.0 if stats.equal else sums.correlation()
    stats.scale = sums.ab / sums.aa if sums.aa > 0.0 else 1.0
    if sums.aa > 0.0 and sums.bb > 0.0:
        stats.scaled_error = math.sqrt(max(0.0, 1.0 - sums.ab * (sums.ab / sums.aa) / sums.bb))
    stats.expected = math.sqrt(stats.expected / sums.aa) if sums.aa > 0.0 else 0.0
