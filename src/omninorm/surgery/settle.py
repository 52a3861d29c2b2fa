"""Which of many changes leave a model's outputs as they are: tried all at once, and only where that fails in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from omninorm.errors import InputError
from omninorm.surgery.report import Surgery
from omninorm.surgery.verify import EXACT, distance, outputs


class Probed:
    """What a model returned for some probes; `distance` says how far it has come from that.

    Raises:
        InputError: it can't be called with them, or returns NaN.
    """

    def __init__(self, model: nn.Module, probes: Sequence[Any]) -> None:
        self.model, self.probes = model, probes
        self.before = [outputs(model, probe) for probe in probes]
        if any(bool(output.isnan().any()) for output in self.before):
            remedy = "look for them with `omninorm inspect`, and restore an earlier checkpoint"
            raise InputError("a model's outputs must be numbers to be compared", "NaN among them", remedy)

    def forget_model(self) -> None:
        """Keeps the outputs alone."""
        del self.model

    def distance(self) -> float:
        """The largest difference of the outputs now, over the largest output."""
        return max(distance(a, outputs(self.model, probe)) for a, probe in zip(self.before, self.probes, strict=True))

    def distance_to(self, other: Probed) -> float:
        """The same, to what another model returned for the same probes."""
        return max(distance(a, b) for a, b in zip(self.before, other.before, strict=True))


def settle(
    items: Sequence[str], attempt: Callable[[Sequence[str], Surgery], float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Applies those of the changes that leave the outputs as they are.

    Args:
        items: names of the changes.
        attempt: applies some of them, with what is needed to undo it, and returns how far the outputs have come.

    Returns:
        (accepted, rejected): name → difference of the outputs.
    """
    if not items:
        return {}, {}
    trial = Surgery()
    error = attempt(items, trial)
    if error <= EXACT:
        return dict.fromkeys(items, error), {}
    trial.undo()
    if len(items) == 1:
        return {}, {items[0]: error}
    half = len(items) // 2
    accepted, rejected = settle(items[:half], attempt)
    also, not_either = settle(items[half:], attempt)
    return accepted | also, rejected | not_either
