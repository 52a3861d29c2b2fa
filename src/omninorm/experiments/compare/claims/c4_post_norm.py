"""C4: post-norm is unstable beyond 12 layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import DEPTHS, LEARNED, TRAINED, card, mean, score, values
from omninorm.experiments.compare.evidence import Evidence, Row

WARM_UP: dict[str, Any] = {
    "name": "warm-up",
    "protocol": "train",
    "placement": ["post"],
    "depth": [20],
    "lr": [0.0003, 0.001],
    "seeds": 4,
    "settings": {**TRAINED, "steps": 400, "warmup_steps": 200},
}
STUDIES = [DEPTHS, WARM_UP]
LIMIT = 12


def judge(evidence: Evidence) -> Card:
    rows = [*evidence.rows("depths", placement="post"), *evidence.rows("warm-up", placement="post")]
    limit = LEARNED * evidence.unigram
    questions = [
        Question(_where(row, evidence), list(values(row, score).values()), limit, True, "bits per byte")
        for row in rows
        if row.variant["depth"] > LIMIT
    ]

    def found(conditions: Sequence[Condition]) -> str:
        said = [_by_rate(evidence, lr, limit) for lr in evidence.values("depths", "lr")]
        late = [
            f"{each.label}: {each.mean:.2f}" for each in conditions if "warm-up" in each.label and each.mean is not None
        ]
        more = f" Bits per byte after a long warm-up: {'; '.join(late)}." if late else ""
        return f"{' '.join(said)}{more} Byte frequencies need {evidence.unigram:.2f}."

    return card(
        "C4",
        "Post-norm is unstable beyond 12 layers.",
        f"Whether post-norm beyond {LIMIT} blocks stays above {LEARNED:g} of the bits per byte of byte frequencies: with the "
        "usual warm-up of a tenth of the run, and with one of half of it.",
        questions,
        found,
        "Xiong et al. 2020 show that post-norm needs a warm-up and small rates, Wang et al. 2019 could not train 20 layers "
        "of it; how deep it trains is a matter of rate, warm-up and length, not of one number.",
    )


def _where(row: Row, evidence: Evidence) -> str:
    late = row in evidence.rows("warm-up")
    return f"{row.variant['depth']} blocks, rate {row.variant['lr']:g}{', a long warm-up' if late else ''}"


def _by_rate(evidence: Evidence, lr: float, limit: float) -> str:
    """Where post-norm and pre-norm learn at a rate: in all runs, in some, in none."""
    said = []
    for place in ("post", "pre"):
        by_depth = {
            row.variant["depth"]: list(values(row, score).values())
            for row in evidence.rows("depths", placement=place, lr=lr)
        }
        share = {depth: mean([each < limit for each in found]) for depth, found in by_depth.items() if found}
        counted = ", ".join(f"{share[depth]:.0%} at {depth}" for depth in sorted(share))
        said.append(f"{place}-norm {counted}")
    return f"Runs that learn at rate {lr:g}, by blocks: {'; '.join(said)}."
