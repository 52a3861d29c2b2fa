"""Published: the largest learning rate that a deep stack tolerates, by placement (KEEL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import TRAINED, card, differences, mean, one, values
from omninorm.experiments.compare.evidence import Evidence, Outcome, Row

# There are two ramps, because one that is slow enough to separate small learning rates does not reach the large ones.
# The slow ramp compares post-norm with deepnorm, the fast ramp compares the others.
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
# In the source, keel tolerates 1.3 times the learning rate of pre-norm; a ratio below 1 by this factor is accepted.
SLACK = math.log(0.77)
NAMES = {"post": "post-norm", "deepnorm": "deepnorm", "pre": "pre-norm", "keel": "keel"}


def judge(evidence: Evidence) -> Card:
    questions = []
    for study, lower, higher in PAIRS:
        ours, theirs = (values(one(evidence.rows(study, placement=place)), _log_rate) for place in (higher, lower))
        label = f"{NAMES[lower]} tolerates {'no more' if higher == 'keel' else 'less'} than {NAMES[higher]}"
        threshold = SLACK if higher == "keel" else 0.0
        questions.append(
            Question(
                label, differences(ours, theirs), threshold, True, "the second's learning rate / the first's", "log"
            )
        )

    def found(conditions: Sequence[Condition]) -> str:
        ramps = []
        for study in ("slow-ramp", "fast-ramp"):
            rows = [row for row in evidence.rows(study) if values(row, _log_rate)]
            rates = ", ".join(_rate(row) for row in rows)
            ramps.append(f"In the ramp to {rows[0].variant['lr']:g}: {rates}." if rows else "")
        note = "A value with ≥ is a lower bound, because no run diverged before the end of the ramp."
        return f"Largest tolerable learning rates (geometric means). {' '.join(ramps)} {note}"

    return card(
        "KEEL",
        "With 32 blocks, post-norm tolerates the smallest learning rates, followed by deepnorm, pre-norm and keel.",
        "One run per seed whose learning rate rises linearly from 0 over 400 steps; the result is the learning rate at the "
        "last step at which the loss still fell. The slow ramp compares post-norm with deepnorm, the fast ramp the others.",
        questions,
        found,
        "KEEL, arXiv 2601.19895, with 64 sublayers: post-norm 3.0e-4, deepnorm 3.5e-4, pre-norm 7.65e-3, keel 1.01e-2, in "
        "5,000 steps with far larger models, which tolerate less. A run that has learned all it can in so few steps counts "
        "as stagnating, which penalizes placements that learn fast.",
    )


def _rate(row: Row) -> str:
    survived = all(outcome["sign"] is None for outcome in row.outcomes.values())
    rate = math.exp(mean(list(values(row, _log_rate).values())))
    return f"{NAMES[row.variant['placement']]} {'≥ ' if survived else ''}{rate:.2g}"


def _log_rate(outcome: Outcome) -> float | None:
    return math.log(outcome["largest_rate"]) if outcome["largest_rate"] else None
