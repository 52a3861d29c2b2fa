"""Published: norms on queries and keys make training less sensitive to the learning rate (Wortsman et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import TRAINED, card, differences, mean, values
from omninorm.experiments.compare.evidence import Evidence, Outcome

STUDIES = [
    {
        "name": "qk-norm",
        "protocol": "train",
        "depth": [4],
        "lr": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
        "vary": {"qk_norm": [False, True]},
        "seeds": 4,
        "settings": TRAINED,
    }
]


def judge(evidence: Evidence) -> Card:
    without, with_norm = sensitivity(evidence, False), sensitivity(evidence, True)
    gains = differences(with_norm, without)
    questions = [Question("4 blocks, pre-norm", gains, 0.0, False, "difference in sensitivity, bits per byte")]

    def found(conditions: Sequence[Condition]) -> str:
        return (
            f"The sensitivity is {mean(list(without.values())):.2f} bits per byte without qk-norm and "
            f"{mean(list(with_norm.values())):.2f} with it."
        )

    return card(
        "qk-norm",
        "Norms on queries and keys make training less sensitive to the learning rate.",
        "The mean over seven learning rates, 3e-4 to 0.3, of the final held-out bits per byte minus the best of them; "
        "diverged runs count as 8.",
        questions,
        found,
        "Wortsman et al. 2023, arXiv 2309.14322, use models of 10 million or more parameters, whose attention logits may "
        "grow more than those of the small models here.",
    )


def sensitivity(evidence: Evidence, qk_norm: bool) -> dict[int, float]:
    """Return the sensitivity of every seed that has a result at each learning rate."""
    rows = evidence.rows("qk-norm", qk_norm=qk_norm)
    by_rate = [values(row, _capped) for row in rows]
    seeds = set.intersection(*(set(each) for each in by_rate)) if by_rate else set()
    scores = {seed: [each[seed] for each in by_rate] for seed in sorted(seeds)}
    return {seed: mean(each) - min(each) for seed, each in scores.items()}


def _capped(outcome: Outcome) -> float | None:
    """Return the score, but at most that at initialization, as Wortsman et al. do."""
    initial = outcome["initial_bits"]
    score: float = outcome["score"]
    return min(score, 8.0 if initial is None else initial)
