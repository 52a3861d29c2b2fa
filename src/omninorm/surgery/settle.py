"""Bisects a set of edits to find those that preserve a model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from omninorm.surgery.proof import Proof, record
from omninorm.surgery.report import Surgery
from omninorm.surgery.runs import Run, outputs
from omninorm.surgery.verify import EXACT, compare


class Probed:
    """A model's outputs for some probes, and the current deviation from them.

    Args:
        model: a copy in float64.
        probes: inputs.
        drawn, thorough: see `record`.

    Raises:
        InputError: the model cannot be called with the probes, or returns NaN.
    """

    def __init__(self, model: nn.Module, probes: Sequence[Any], *, drawn: bool = False, thorough: bool = True) -> None:
        self.model = model
        recorded = record(model, probes, drawn=drawn, thorough=thorough)
        self.runs, self.before = recorded.runs, recorded.outputs
        self.main = self.runs[: len(probes)]
        self.proof: Proof = recorded.proof

    @property
    def device(self) -> str:
        """Where the outputs are compared."""
        return str(next(iter(self.before[0].values())).device)

    def forget_model(self) -> None:
        """Release the model and keep its outputs."""
        del self.model

    def distance(self, runs: Sequence[Run] | None = None) -> float:
        """Return the largest difference of the outputs now, relative to the largest value of the same output.

        Args:
            runs: only these; None for all.
        """
        largest, intended = 0.0, dict(self.proof.by_design)
        for before, run in zip(self.before, self.runs, strict=True):
            if runs is None or run in runs:
                relative, _, moved = compare(before, outputs(self.model, run))
                largest = max(largest, relative)
                intended |= {name: max(gap, intended.get(name, 0.0)) for name, gap in moved.items()}
        if runs is None:
            self.proof = replace(self.proof, by_design=intended)
        return largest

    def distance_to(self, other: Probed) -> float:
        """Return the same for another model's outputs for the same probes."""
        theirs = dict(zip((run.name for run in other.runs), other.before, strict=True))
        both = [
            (mine, theirs[run.name]) for mine, run in zip(self.before, self.runs, strict=True) if run.name in theirs
        ]
        return max(compare(mine, their)[0] for mine, their in both)


def settle(
    items: Sequence[str], attempt: Callable[[Sequence[str], Surgery], float], limit: float = EXACT
) -> tuple[dict[str, float], dict[str, float]]:
    """Apply those of the edits that preserve the outputs: all at once, and halves of them where that fails.

    Args:
        items: names of the edits.
        attempt: applies some of them, recording how to undo them, and returns the deviation of the outputs.
        limit: the largest deviation to accept.

    Returns:
        (accepted, rejected): name → deviation of the outputs.
    """
    if not items:
        return {}, {}
    trial = Surgery()
    error = attempt(items, trial)
    if error <= limit:
        return dict.fromkeys(items, error), {}
    trial.undo()
    if len(items) == 1:
        return {}, {items[0]: error}
    half = len(items) // 2
    accepted, rejected = settle(items[:half], attempt, limit)
    also, not_either = settle(items[half:], attempt, limit)
    return accepted | also, rejected | not_either
