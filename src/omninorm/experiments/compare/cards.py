"""Verdict cards: a claim, what was measured, with intervals, and what may be said.

A claim says something of several conditions (a depth, a rate, a start). Each is a question: the mean of a number over
the seeds against a threshold. The p-values of a card's questions are corrected together by Holm's procedure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omninorm.experiments.compare.statistics import MOST_SEEDS, SIGNIFICANCE, Paired, holm, paired, seeds_needed

HOLDS, PARTLY, FAILS = "holds", "holds only when", "does not hold here"
YES, NO, UNCLEAR = "yes", "no", "unclear"


@dataclass(frozen=True)
class Question:
    """A condition of a claim.

    Args:
        label: the condition, as in "holds only when …".
        samples: the measured number, one for each seed.
        threshold: what it is compared with.
        above: whether the claim says that it is above the threshold.
        unit: of the number.
        scale: how a reader is shown it: "linear", or "log" where the samples are logarithms.
    """

    label: str
    samples: Sequence[float]
    threshold: float
    above: bool
    unit: str
    scale: str = "linear"


@dataclass(frozen=True)
class Condition:
    """An answer: "yes", "no" or "unclear", and how many more seeds would tell; the mean and its 95 % interval."""

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
        conditions: what the verdict is made of.
        verdict: "holds", "holds only when …", "does not hold here", or "not enough evidence: needs about N more seeds".
        found: the finding in a sentence or two, with its figures.
        source: what others found, and where this differs.
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
    """The answer to every question."""
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
    """What the conditions come to together."""
    outcomes = {condition.outcome for condition in conditions}
    if outcomes == {YES}:
        return HOLDS
    if outcomes == {NO}:
        return FAILS
    if YES in outcomes and NO in outcomes:
        return f"{PARTLY}: {'; '.join(each.label for each in conditions if each.outcome == YES)}"
    more = max((each.more for each in conditions if each.outcome == UNCLEAR), default=2)
    return f"not enough evidence: needs about {more} more seed{'s' if more > 1 else ''}"
