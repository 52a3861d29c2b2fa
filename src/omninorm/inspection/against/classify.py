"""Classifies the difference between two matched parts: rounding, an offset, a scale, a row order, other values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from omninorm.inspection.against.convention import Convention
from omninorm.inspection.against.match import Match
from omninorm.inspection.against.measure import PairStats, is_quantized, measure_pair, precision, tolerance
from omninorm.inspection.against.parts import Part
from omninorm.inspection.names import place

FINE = ("equal", "rounding", "quantization")
_RELATED = 0.9  # the least correlation between two versions of a matrix, even if it is coarsely quantized
_MARGIN, _SMALLEST_ERROR = 2.5, 0.01
_MOST_ROWS = 1 << 13  # matrices with more rows are not searched for another row order
_SAMPLE = 1 << 12
_FEW = 0.5  # a fraction of the values


@dataclass(frozen=True)
class Result:
    """The comparison of one pair.

    Args:
        a, b: the parts, in the layout in which they fit best.
        how: the way in which they were matched.
        outcome: "equal", "rounding", "quantization", or the name of a difference.
        amount: the size of the difference: the number added, the factor, or the count of values.
        layout: the row order that fits, if it is not the stored one.
        expected_layout: whether the file's format explains this order.
        stats: the measurements; None if the shapes differ.
        sample: the first values of both, to search for swapped tensors; None unless the values differ.
    """

    a: Part
    b: Part
    how: str
    outcome: str
    stats: PairStats | None = None
    amount: float | None = None
    layout: str | None = None
    expected_layout: bool = True
    sample: tuple[Tensor, Tensor] | None = None

    @property
    def kind(self) -> str:
        """The kind of tensor, such as "gain" or "matrix"."""
        return place(self.a.name, self.a.tensor.shape).kind

    def to_record(self) -> dict[str, Any]:
        stats = self.stats
        measured = {} if stats is None else {"error": stats.error, "max_abs": stats.max_abs, "expected": stats.expected}
        return {
            "key": self.a.key, "a": self.a.name, "b": self.b.name, "matched": self.how, "outcome": self.outcome,
            "amount": self.amount, "layout": self.layout, "expected_layout": self.expected_layout,
            "dtypes": [self.a.tensor.dtype, self.b.tensor.dtype], **measured,
        }  # fmt: skip


def compare_pair(pair: Match, a: Convention, b: Convention) -> Result:
    """Measure one pair in each layout that the formats may use, until one fits.

    Raises:
        RunError: a file is damaged.
    """
    if pair.how == "shape":
        return Result(pair.a, pair.b, pair.how, "shape")
    first: Result | None = None
    for ours, theirs, layout, expected in _layouts(pair, a, b):
        stats = measure_pair(ours, theirs)
        found = Result(ours, theirs, pair.how, "", stats, None, layout, expected)
        outcome, amount = _outcome(ours, theirs, stats)
        found = replace(found, outcome=outcome, amount=amount)
        if outcome not in ("values", "few"):
            return found
        if outcome == "few":
            return _with_sample(found)
        first = first or found
    assert first is not None
    return _with_sample(first)


def _with_sample(result: Result) -> Result:
    return replace(result, sample=(result.a.head(_SAMPLE), result.b.head(_SAMPLE)))


def _layouts(pair: Match, a: Convention, b: Convention) -> Iterator[tuple[Part, Part, str | None, bool]]:
    """Yield both parts in each layout, with its name and whether it is the expected one, which comes first."""
    if pair.a.key.partition(".")[2].partition(".")[2].startswith(("attn_q.", "attn_k.")):
        yield from _head_layouts(pair, a, b)
    else:
        yield pair.a, pair.b, None, True
    if pair.a.shape[0] == pair.a.shape[1] > 1:
        yield pair.a, replace(pair.b, transposed=not pair.b.transposed), "transposed in B", False
    if not pair.a.is_vector and pair.a.shape[0] <= _MOST_ROWS:
        order = row_order(pair.a.values(), pair.b.values())
        if order is not None:
            expected = a.reorders(pair.a.key) or b.reorders(pair.a.key)
            yield pair.a, replace(pair.b, order=order), "rows in another order in B", expected


def _head_layouts(pair: Match, a: Convention, b: Convention) -> Iterator[tuple[Part, Part, str | None, bool]]:
    """Yield the layouts of queries and keys: as they are, or with each head's halves interleaved in one of them."""
    counts = _head_counts(pair, a, b)
    right = counts[0] if counts else 0
    plain = (pair.a, pair.b, None, a.interleaves in (b.interleaves, None) or b.interleaves is None)
    in_a = (replace(pair.a, heads=right), pair.b, "rows of A interleaved by head", a.interleaves is not False)
    in_b = (pair.a, replace(pair.b, heads=right), "rows of B interleaved by head", b.interleaves is not False)
    if a.interleaves == b.interleaves or not right:
        yield plain
        yield from (in_a, in_b) if right else ()
    else:
        by_format = in_b if b.interleaves else in_a
        yield from (by_format, (*plain[:3], None in (a.interleaves, b.interleaves)))
        yield in_a if by_format is in_b else in_b
    for heads in counts[1:]:
        name = f"rows of B interleaved by {heads} heads instead of {right}"
        yield pair.a, replace(pair.b, heads=heads), name, False


def _head_counts(pair: Match, a: Convention, b: Convention) -> list[int]:
    """Return the likely number of heads, and another number that a converter may have used by mistake."""
    number = 1 if ".attn_k." in pair.a.key else 0
    found = [each.heads()[i] for i in (number, 1 - number) for each in (a, b)]
    rows = pair.a.shape[0]
    return list(dict.fromkeys(count for count in found if count and rows % (2 * count) == 0 and rows > 2 * count))


def _outcome(a: Part, b: Part, stats: PairStats) -> tuple[str, float | None]:
    """Return the name of the difference, and its amount."""
    if stats.a_bad != stats.b_bad:
        return "non-finite", float(stats.b_bad or stats.a_bad)
    if stats.equal:
        return "equal", None
    if stats.a_zero or stats.b_zero:
        return "zero", None
    quantized = [each.tensor.dtype for each in (a, b) if is_quantized(each.tensor.dtype)]
    if a.is_vector and not quantized:
        return _vector_outcome(a, b, stats)
    return _quantized_outcome(stats, quantized) if quantized else _matrix_outcome(stats)


def _quantized_outcome(stats: PairStats, dtypes: list[str]) -> tuple[str, float | None]:
    limit = _MARGIN * stats.expected + _SMALLEST_ERROR
    if stats.error <= limit and not stats.odd_rows:
        return "quantization", None
    if stats.scaled_error <= limit and stats.scaled_error < 0.5 * stats.error and min(map(precision, dtypes)) > 2:
        return "scale", float(f"{stats.scale:.2g}")
    if (stats.correlation or 0.0) < _RELATED:
        return "values", None
    return ("rows", float(stats.odd_rows)) if stats.odd_rows else ("precision", stats.error)


def _matrix_outcome(stats: PairStats) -> tuple[str, float | None]:
    if not stats.beyond or stats.grid:
        return "rounding", None
    if stats.scaled_error < 0.01 and stats.scaled_error < 0.2 * stats.error:
        return "scale", stats.scale
    if stats.beyond <= _FEW * stats.numel and (stats.correlation or 0.0) >= _RELATED:
        return "few", float(stats.beyond)
    return "values", None


def _vector_outcome(a: Part, b: Part, stats: PairStats) -> tuple[str, float | None]:
    if not stats.beyond or stats.grid:
        return "rounding", None
    ours, theirs = (part.values().flatten().double() + part.offset for part in (a, b))
    near = tolerance(ours, theirs, a, b)
    shift = float((theirs - ours).median())
    shift = float(round(shift)) if abs(shift - round(shift)) < 0.01 and round(shift) else shift
    if bool(((theirs - ours - shift).abs() <= 2 * near).all()):
        return "shift", shift
    if bool(((theirs - stats.scale * ours).abs() <= 2 * near * max(1.0, abs(stats.scale))).all()):
        return "scale", stats.scale
    if stats.a_constant != stats.b_constant:
        return "constant", float((ours if stats.a_constant else theirs)[0])
    return ("few", float(stats.beyond)) if stats.beyond <= _FEW * stats.numel else ("values", None)


def row_order(a: Tensor, b: Tensor) -> tuple[int, ...] | None:
    """Return for each row of a the index of the equal row of b; None if b is not a with its rows in another order."""
    columns = min(a.shape[1], 1 << 9)
    ours, theirs = (torch.nn.functional.normalize(each[:, :columns].float(), dim=1) for each in (a, b))
    best, found = (ours @ theirs.T).max(1)
    if float(best.median()) < _RELATED or len(set(found.tolist())) < len(found):
        return None
    return tuple(found.tolist())


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖b − a‖ / ‖a‖, or infinity for tensors of other sizes."""
    if a.shape != b.shape or not float(a.norm()):
        return float("inf")
    return float((b.double() - a.double()).norm() / a.double().norm())
