"""Bisects a set of edits to find those that preserve a model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from omninorm.errors import InputError
from omninorm.surgery.report import Surgery
from omninorm.surgery.verify import EXACT, distance, outputs


class Probed:
    """A model's outputs for some probes, and the current deviation from them.

    Raises:
        InputError: the model cannot be called with the probes, or returns NaN.
    """

    def __init__(self, model: nn.Module, probes: Sequence[Any]) -> None:
        self.model, self.probes = model, probes
        self.before = [outputs(model, probe) for probe in probes]
        if any(bool(output.isnan().any()) for output in self.before):
            remedy = "find the faulty weights with `omninorm inspect`, and restore an earlier checkpoint"
            raise InputError("The model's outputs contain NaN, so they cannot be compared", "", remedy)

    @property
    def device(self) -> str:
        """Where the outputs are compared."""
        return str(self.before[0].device)

    def forget_model(self) -> None:
        """Release the model and keep its outputs."""
        del self.model

    def distance(self) -> float:
        """Return the largest difference of the outputs now, relative to the largest output."""
        return max(distance(a, outputs(self.model, probe)) for a, probe in zip(self.before, self.probes, strict=True))

    def distance_to(self, other: Probed) -> float:
        """Return the same for another model's outputs for the same probes."""
        return max(distance(a, b) for a, b in zip(self.before, other.before, strict=True))


def settle(
    items: Sequence[str], attempt: Callable[[Sequence[str], Surgery], float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Apply those of the edits that preserve the outputs: all at once, and halves of them where that fails.

    Args:
        items: names of the edits.
        attempt: applies some of them, recording how to undo them, and returns the deviation of the outputs.

    Returns:
        (accepted, rejected): name → deviation of the outputs.
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
