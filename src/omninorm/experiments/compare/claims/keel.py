"""Published: the largest learning rate that a deep stack tolerates, by placement (KEEL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import TRAINED, card, differences, mean, one, values
from omninorm.experiments.compare.evidence import Evidence, Outcome, Row

# Two ramps, since one that tells small rates apart ends below the large ones: post against deepnorm in the slow one, the
# others in the fast one.
SLOW: dict[str, Any] = {
    "name": "slow-ramp",
    "protocol": "ramp",
    "placement": ["post", "deepnorm"],
    "depth": [32],
    "lr": [0.01],
    "seeds": 5,
    "margin": 0.7,
    "settings": {**TRAINED, "steps": 400},
}
FAST: dict[str, Any] = {**SLOW, "name": "fast-ramp", "placement": ["deepnorm", "pre", "keel"], "lr": [0.04]}
STUDIES = [SLOW, FAST]
PAIRS = (("slow-ramp", "post", "deepnorm"), ("fast-ramp", "deepnorm", "pre"), ("fast-ramp", "pre", "keel"))
# Of pre and keel the source says "at most", and 1.3-fold apart: keel may fall short by so much.
SLACK = math.log(0.77)


def judge(evidence: Evidence) -> Card:
    questions = []
    for study, lower, higher in PAIRS:
        ours, theirs = (values(one(evidence.rows(study, placement=place)), _log_rate) for place in (higher, lower))
        label = f"{lower} tolerates {'no more' if higher == 'keel' else 'less'} than {higher}"
        threshold = SLACK if higher == "keel" else 0.0
        questions.append(
            Question(label, differences(ours, theirs), threshold, True, "the second's rate over the first's", "log")
        )

    def found(conditions: Sequence[Condition]) -> str:
        said = []
        for study in ("slow-ramp", "fast-ramp"):
            rows = [row for row in evidence.rows(study) if values(row, _log_rate)]
            told = ", ".join(_told(row) for row in rows)
            said.append(f"In the ramp to {rows[0].variant['lr']:g}: {told}." if rows else "")
        return f"Largest tolerable rates, geometric means. {' '.join(said)} A rate with ≥ was that of the end in every run."

    return card(
        "KEEL",
        "At 32 blocks post-norm tolerates the smallest learning rates, then deepnorm, then pre-norm, then keel.",
        "One run each whose rate rises linearly from 0 in 400 steps; the rate of the last step at which the loss still fell. "
        "The slow ramp tells post-norm from deepnorm, the fast one the others.",
        questions,
        found,
        "KEEL, arXiv 2601.19895, at 64 sublayers: post 3.0e-4, deepnorm 3.5e-4, pre 7.65e-3, keel 1.01e-2, in 5,000 steps with "
        "far larger models, which tolerate less. A run that has learned all it can in so few steps counts as stagnating, "
        "which speaks against what learns fast.",
    )


def _told(row: Row) -> str:
    survived = all(outcome["sign"] is None for outcome in row.outcomes.values())
    return f"{row.variant['placement']} {'≥ ' if survived else ''}{math.exp(mean(list(values(row, _log_rate).values()))):.2g}"


def _log_rate(outcome: Outcome) -> float | None:
    return math.log(outcome["largest_rate"]) if outcome["largest_rate"] else None
