"""What claims share: the size of their models, studies that several of them judge by, and differences of paired seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omninorm.experiments.compare.cards import Card, Condition, Question, decide, verdict
from omninorm.experiments.compare.evidence import Outcome, Row

# Bytes of real text; GELU, since without norms a gated feed-forward overflows before anything can be measured.
TINY = {"d_model": 32, "n_heads": 2, "seq_len": 64, "batch_size": 8, "feed_forward": "gelu", "eval_bytes": 16384}
TRAINED = {**TINY, "steps": 200}
# A run that predicts the held-out text no better than this share of what byte frequencies need has not learned.
LEARNED = 0.9

NORMS: dict[str, Any] = {
    "name": "norms",
    "protocol": "train",
    "normalization": ["rmsnorm", "layernorm"],
    "depth": [4, 12],
    "lr": [0.003],
    "seeds": 8,
    "settings": TRAINED,
}
DEPTHS: dict[str, Any] = {
    "name": "depths",
    "protocol": "train",
    "placement": ["pre", "post"],
    "depth": [4, 8, 12, 20],
    "lr": [0.001, 0.003],
    "seeds": 10,
    "settings": TRAINED,
}


def card(
    name: str,
    claim: str,
    measured: str,
    questions: Sequence[Question],
    found: Callable[[Sequence[Condition]], str],
    source: str,
) -> Card:
    """A claim's card from its questions; `found` tells the finding."""
    conditions = decide(questions)
    finding = (
        found(conditions)
        if any(condition.mean is not None for condition in conditions)
        else "Nothing was measured that could be judged."
    )
    return Card(name, claim, measured, conditions, verdict(conditions), finding, source)


def values(row: Row | None, read: Callable[[Outcome], float | None]) -> dict[int, float]:
    """A number of every seed; seeds without one are left out."""
    if row is None:
        return {}
    found = {seed: read(outcome) for seed, outcome in row.outcomes.items()}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours minus theirs, seed by seed."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def score(outcome: Outcome) -> float | None:
    """Held-out bits per byte, 8 for a run that was lost."""
    found: float | None = outcome["score"]
    return found


def mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers) if numbers else math.nan


def one(rows: Sequence[Row]) -> Row | None:
    """The row, where there is one."""
    return rows[0] if rows else None
