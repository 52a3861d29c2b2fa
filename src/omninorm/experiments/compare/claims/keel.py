"""Published: the largest learning rate that a deep stack tolerates, by placement (KEEL)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import TRAINED, card, differences, mean, one, values
from omninorm.experiments.compare.evidence import Evidence, Outcome

ORDER = ("post", "deepnorm", "pre", "keel")
STUDIES = [
    {
        "name": "ramp",
        "protocol": "ramp",
        "placement": list(ORDER),
        "depth": [32],
        "lr": [0.02],
        "seeds": 4,
        "margin": 0.7,
        "settings": {**TRAINED, "steps": 400},
    }
]
# Of pre and keel the source says "at most", and 1.3-fold apart: keel may fall short by so much.
SLACK = math.log(0.77)


def judge(evidence: Evidence) -> Card:
    by_place = {place: values(one(evidence.rows("ramp", placement=place)), _log_rate) for place in ORDER}
    questions = [
        Question(
            f"{lower} tolerates {'no more' if higher == 'keel' else 'less'} than {higher}",
            differences(by_place[higher], by_place[lower]),
            SLACK if higher == "keel" else 0.0,
            True,
            f"{higher}'s rate over {lower}'s",
            "log",
        )
        for lower, higher in itertools.pairwise(ORDER)
    ]

    def found(conditions: Sequence[Condition]) -> str:
        rates = ", ".join(
            f"{place} {math.exp(mean(list(by_place[place].values()))):.2g}" for place in ORDER if by_place[place]
        )
        survived = [
            f"{sum(outcome['sign'] is None for outcome in row.outcomes.values())} of {len(row.outcomes)} runs of {place}"
            for place in ORDER
            for row in evidence.rows("ramp", placement=place)
        ]
        return f"Largest tolerable rates, geometric means: {rates}. The end of the ramp was survived by {', '.join(survived)}."

    return card(
        "KEEL",
        "At 32 blocks post-norm tolerates the smallest learning rates, then deepnorm, then pre-norm, then keel.",
        "One run each whose rate rises from 0 to 0.02 in 400 steps; the rate of the last step at which the loss still fell, 0.02 where it fell to the end.",
        questions,
        found,
        "KEEL, arXiv 2601.19895, at 64 sublayers: post 3.0e-4, deepnorm 3.5e-4, pre 7.65e-3, keel 1.01e-2, with models and "
        "runs far larger than these; wider models tolerate less.",
    )


def _log_rate(outcome: Outcome) -> float | None:
    return math.log(outcome["largest_rate"]) if outcome["largest_rate"] else None
