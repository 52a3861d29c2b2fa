"""Shared parts of claims: model sizes, studies that several claims use, and differences of paired seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omninorm.experiments.compare.cards import Card, Condition, Question, decide, verdict
from omninorm.experiments.compare.evidence import Outcome, Row
from omninorm.experiments.demo import LEARNED_BELOW

# GELU, because without norms a gated feed-forward layer overflows before anything can be measured.
TINY = {"d_model": 32, "n_heads": 2, "seq_len": 64, "batch_size": 8, "feed_forward": "gelu", "eval_bytes": 16384}
TRAINED = {**TINY, "steps": 200}
# A run has learned if it needs less than this share of the unigram baseline's bits per byte.
LEARNED = LEARNED_BELOW

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
    """Build a claim's card from its questions; `found` returns the finding as text."""
    conditions = decide(questions)
    finding = (
        found(conditions)
        if any(condition.mean is not None for condition in conditions)
        else "Nothing was measured that could be judged."
    )
    return Card(name, claim, measured, conditions, verdict(conditions), finding, source)


def values(row: Row | None, read: Callable[[Outcome], float | None]) -> dict[int, float]:
    """Return what `read` returns for the outcome of every seed; seeds without a finite value are left out."""
    if row is None:
        return {}
    found = {seed: read(outcome) for seed, outcome in row.outcomes.items()}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Return ours minus theirs, by seed."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def score(outcome: Outcome) -> float | None:
    """Return the held-out bits per byte, or 8 for a diverged run."""
    found: float | None = outcome["score"]
    return found


def mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers) if numbers else math.nan


def one(rows: Sequence[Row]) -> Row | None:
    """Return the first row, or None without rows."""
    return rows[0] if rows else None


def blocks(depth: int) -> str:
    """Return a depth in words, such as "4 blocks"."""
    return f"{depth} block{'' if depth == 1 else 's'}"


def span(numbers: Sequence[float], form: str) -> str:
    """Return the smallest and the largest number as text.

    Example:
        >>> span([0.5, 2.0, 1.0], ".2f"), span([1.0], ".2f")
        ('0.50 to 2.00', '1.00')
    """
    low, high = (format(end(numbers), form) for end in (min, max))
    return low if low == high else f"{low} to {high}"
