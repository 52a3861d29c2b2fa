"""Change of the residual stream and its gradient over depth, for depth-growth, no-norm and post-norm-depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from omninorm.monitor.history import Facts, History, Sample
from omninorm.monitor.rules.numbers import fold, known, line_error, values_of


class Growth(NamedTuple):
    """Change from the first to the last of `blocks` blocks: the ratio v_L/v_1, and whether v² fits an exponential over
    depth better than a line. With `backward` the ratio is v_1/v_L, in the direction of the gradients. `stack` names the
    blocks if the model has several stacks."""

    ratio: float
    blocks: int
    exponential: bool
    backward: bool = False
    stack: str = ""

    @property
    def exponent(self) -> float:
        """The exponent (1/L)·|ln(v_L/v_1)|."""
        return abs(math.log(self.ratio)) / self.blocks

    @property
    def total(self) -> float:
        """The factor between the two ends, at least 1."""
        return max(self.ratio, 1.0 / self.ratio)

    def words(self, what: str) -> str:
        """Describe the change in a clause that begins with `what`."""
        verb = "grows" if self.ratio >= 1.0 else "shrinks"
        blocks = f"{self.blocks} blocks" + (f" in {self.stack}" if self.stack else "")
        way = f"from the last of {blocks} back to the first"
        if not self.backward:
            way = f"from the first to the last of {blocks}"
        return f"{what} {verb} {fold(self.total)} {way}"


def growth(sample: Sample, signal: str, facts: Facts) -> Growth | None:
    """Return the change of a signal over depth; None with fewer than two blocks or unless both ends are positive.

    In a model with several chains of blocks, such as an encoder and a decoder, it is the largest change in one of them.
    """
    values = values_of(sample, signal)
    if len(facts.chains) < 2:
        return _growth(values)
    found = []
    for chain in facts.chains:
        change = _growth([values[at] for at in chain if at < len(values)])
        if change is not None:
            found.append(change._replace(stack=facts.blocks[chain[0]].rpartition(".")[0]))
    return max(found, key=lambda change: change.total, default=None)


def _growth(values: Sequence[float | None]) -> Growth | None:
    if len(values) < 2 or not values[0] or not values[-1] or min(values[0], values[-1]) <= 0.0:
        return None
    ratio = values[-1] / values[0]
    if not 0.0 < ratio < math.inf:
        return None
    squares = [value * value for value in known(values) if value > 0.0]
    usable = len(squares) > 2 and min(squares) > 0.0 and max(squares) < math.inf
    exponential = usable and line_error([math.log(square) for square in squares]) < line_error(squares)
    return Growth(ratio, len(values), exponential)


def backward_growth(sample: Sample, facts: Facts) -> Growth | None:
    """Return the change of the gradient in the direction in which it flows, from the last block to the first."""
    found = growth(sample, "stream_grad", facts)
    return None if found is None else found._replace(ratio=1.0 / found.ratio, backward=True)


def has_no_norm(history: History) -> bool:
    """Return whether the model has blocks and none of them has a norm, or normalizes in its own code."""
    if history.placement is not None or history.placement_reason or not history.facts.blocks:
        return history.placement == "none"
    return all(norm.block is None for norm in history.facts.norms)
