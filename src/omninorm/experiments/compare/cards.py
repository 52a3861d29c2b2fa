"""Verdict cards: a claim, the measurements with their intervals, and the verdict.

A claim covers several conditions (a depth, a learning rate, an initialization). Each condition is a question: is the
mean of a measured value over the seeds above or below a threshold? Holm's procedure corrects the p-values of a card's
questions together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omninorm.experiments.compare.statistics import MOST_SEEDS, SIGNIFICANCE, Paired, holm, paired, seeds_needed
from omninorm.report.comparison.wording import not_enough_evidence

HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold here"
YES, NO, UNCLEAR = "yes", "no", "unclear"


@dataclass(frozen=True)
class Question:
    """A condition of a claim.

    Args:
        label: the condition, such as "4 blocks, learning rate 0.003".
        samples: the measured values, one per seed.
        threshold: the value to compare their mean with.
        above: whether the claim is that the mean is above the threshold; otherwise that it is below.
        unit: the unit of the values.
        scale: "linear", or "log" if the samples are logarithms that are displayed as their exponentials.
    """

    label: str
    samples: Sequence[float]
    threshold: float
    above: bool
    unit: str
    scale: str = "linear"


@dataclass(frozen=True)
class Condition:
    """An answer: "yes", "no" or "unclear" and the number of further seeds needed; the mean and its 95 % interval."""

    label: str
    outcome: str
    more: int
    mean: float | None
    low: float | None
    high: float | None
    threshold: float
    above: bool
    seeds: int
    unit: str
    scale: str


@dataclass(frozen=True)
class Card:
    """A claim's verdict.

    Args:
        id: "C1", …
        claim: the sentence that is judged.
        measured: what was measured, in a sentence.
        conditions: the answers that determine the verdict.
        verdict: "holds", "holds in part (2 of 5 conditions)", "does not hold here", or "not enough evidence (about N
            more seeds needed)".
        found: the finding in a few sentences, with its figures.
        source: the findings of others, and how their experiments differ.
    """

    id: str
    claim: str
    measured: str
    conditions: tuple[Condition, ...]
    verdict: str
    found: str
    source: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(questions: Sequence[Question]) -> tuple[Condition, ...]:
    """Answer every question."""
    results = [_against_threshold(question) for question in questions]
    corrected = holm([1.0 if result is None else result.p for result in results])
    return tuple(_condition(*each) for each in zip(questions, results, corrected, strict=True))


def _against_threshold(question: Question) -> Paired | None:
    if not question.samples:
        return None
    return paired(question.samples, [question.threshold] * len(question.samples))


def _condition(question: Question, result: Paired | None, p: float) -> Condition:
    outcome, more = UNCLEAR, 0
    if result is None or result.seeds < 2:
        more = 2 - len(question.samples)
    elif p < SIGNIFICANCE:
        outcome = YES if (result.mean > 0) == question.above else NO
    else:
        wanted = seeds_needed(result.spread, abs(result.mean)) if result.mean else MOST_SEEDS
        more = max(1, wanted - result.seeds)
    known = (None, None, None) if result is None else (result.mean, result.low, result.high)
    mean, low, high = (
        None if value is None or not math.isfinite(value) else value + question.threshold for value in known
    )
    return Condition(
        label=question.label,
        outcome=outcome,
        more=more,
        mean=mean,
        low=low,
        high=high,
        threshold=question.threshold,
        above=question.above,
        seeds=len(question.samples),
        unit=question.unit,
        scale=question.scale,
    )


def verdict(conditions: Sequence[Condition]) -> str:
    """Return the verdict on all conditions together."""
    outcomes = {condition.outcome for condition in conditions}
    if outcomes == {YES}:
        return HOLDS
    if outcomes == {NO}:
        return FAILS
    if YES in outcomes and NO in outcomes:
        return f"{PARTLY} ({sum(each.outcome == YES for each in conditions)} of {len(conditions)} conditions)"
    return not_enough_evidence(max((each.more for each in conditions if each.outcome == UNCLEAR), default=2))
