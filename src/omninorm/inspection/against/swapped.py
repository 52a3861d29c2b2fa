"""Finds tensors that changed places: one checkpoint has them under another tensor's name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from omninorm.inspection.against.classify import Result, distance
from omninorm.inspection.against.measure import is_quantized

_CLOSE, _CLOSE_QUANTIZED = 0.02, 0.4
_MOST = 256  # the largest number of candidates of the same shape


def find_moved(results: Sequence[Result]) -> dict[str, str]:
    """Return a dictionary from each key of A that B has under another name to this name."""
    groups: dict[tuple[int, int], list[Result]] = defaultdict(list)
    for each in results:
        if each.sample is not None:
            groups[each.a.shape].append(each)
    moved: dict[str, str] = {}
    for group in groups.values():
        for each in group[:_MOST]:
            closest = min(group[:_MOST], key=lambda other: _distance(each, other))
            if closest is not each and _distance(each, closest) <= _limit(each, closest):
                moved[each.a.key] = closest.a.key
    return moved


def _distance(result: Result, other: Result) -> float:
    assert result.sample is not None
    assert other.sample is not None
    return distance(result.sample[0], other.sample[1])


def _limit(result: Result, other: Result) -> float:
    quantized = is_quantized(result.a.tensor.dtype) or is_quantized(other.b.tensor.dtype)
    return min(_CLOSE_QUANTIZED if quantized else _CLOSE, 0.5 * _distance(result, result))
