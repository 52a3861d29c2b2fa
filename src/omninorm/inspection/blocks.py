"""The depth profile: statistics per block, and matrices of the same role across blocks."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from omninorm.inspection.measure import TensorStats


@dataclass
class BlockStats:
    """Statistics of one block. An RMS value is over all weights of a kind; it is None if the block has none.

    attention_out and feed_forward_out are the matrices that write to the residual stream. gain_median is the median of
    the median |γ| of the block's norms, and gain_max the largest |γ|.
    """

    stack: str
    block: int
    tensors: int
    parameters: int
    attention_out: float | None
    feed_forward_out: float | None
    matrices: float | None
    max_abs: float
    gain_median: float | None
    gain_max: float | None

    def to_record(self) -> dict[str, Any]:
        return asdict(self)


def block_profile(tensors: Iterable[TensorStats]) -> list[BlockStats]:
    """Return the statistics of every block, stack by stack."""
    members: dict[tuple[str, int], list[TensorStats]] = defaultdict(list)
    for tensor in tensors:
        if tensor.place.stack is not None and tensor.place.block is not None:
            members[tensor.place.stack, tensor.place.block].append(tensor)
    order = {stack: number for number, (stack, _) in enumerate(members)}
    keys = sorted(members, key=lambda key: (order[key[0]], key[1]))
    return [_block(stack, block, members[stack, block]) for stack, block in keys]


def same_role(tensors: Iterable[TensorStats]) -> list[list[TensorStats]]:
    """Group matrices by role and shape, for roles that occur in at least three blocks."""
    roles: dict[tuple[str, tuple[int, ...]], list[TensorStats]] = defaultdict(list)
    for tensor in tensors:
        if tensor.place.kind == "matrix" and tensor.place.block is not None and tensor.is_matrix:
            roles[tensor.place.role, tensor.shape].append(tensor)
    return [group for group in roles.values() if len({each.place.layer for each in group}) >= 3]


def _block(stack: str, block: int, tensors: list[TensorStats]) -> BlockStats:
    matrices = [each for each in tensors if each.is_matrix]
    gains = [each.gains for each in tensors if each.gains is not None]
    return BlockStats(
        stack,
        block,
        len(tensors),
        sum(each.numel for each in tensors if each.measured and each.place.kind != "buffer"),
        _rms([each for each in matrices if each.place.branch == "attention"]),
        _rms([each for each in matrices if each.place.branch == "feed-forward"]),
        _rms(matrices),
        max((each.max_abs for each in matrices), default=0.0),
        statistics.median([each.median for each in gains]) if gains else None,
        max([each.largest for each in gains]) if gains else None,
    )


def _rms(tensors: list[TensorStats]) -> float | None:
    """Return √mean(w²) over all their weights. Unlike a sum of squares, hypot cannot overflow."""
    count = sum(each.numel for each in tensors)
    return math.hypot(*(each.rms * math.sqrt(each.numel / count) for each in tensors)) if count else None
