"""Words for verdicts that several parts of a comparison print."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# A larger estimate means "many": it depends on a spread that a few seeds measure badly.
MOST_SEEDS_NAMED = 100


def not_enough_evidence(more: int) -> str:
    """Return the verdict for a question that about `more` further seeds would settle.

    Example:
        >>> not_enough_evidence(1), not_enough_evidence(998)
        ('not enough evidence (about 1 more seed needed)', 'not enough evidence (more than 100 seeds needed)')
    """
    if more > MOST_SEEDS_NAMED:
        return f"not enough evidence (more than {MOST_SEEDS_NAMED} seeds needed)"
    return f"not enough evidence (about {more} more seed{'' if more == 1 else 's'} needed)"


def count_outcomes(outcomes: Mapping[str, str], diverged: Collection[str], runs: int, missing: int = 0) -> str:
    """Return how many runs of a configuration learned, stagnated, diverged and failed.

    Args:
        outcomes: "learned", "stagnated" or "diverged" by seed; empty if only divergence was measured.
        diverged: the seeds of runs that diverged.
        runs: the number of runs that have a value.
        missing: the number of runs that failed.

    Example:
        >>> count_outcomes({"0": "learned", "1": "diverged"}, ["1"], 2), count_outcomes({}, ["1"], 2, missing=1)
        ('1 learned, 1 diverged', '1 of 2 diverged, 1 failed')
    """
    values = list(outcomes.values())
    counts = {name: values.count(name) for name in ("learned", "stagnated", "diverged")}
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    if not parts and runs:
        parts = [f"{len(diverged)} of {runs} diverged"]
    return ", ".join([*parts, *([f"{missing} failed"] if missing else [])])
