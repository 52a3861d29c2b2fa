"""C4: post-norm is unstable beyond 12 layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import DEPTHS, LEARNED, TRAINED, blocks, card, mean, score, span, values
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
        shares = [_by_rate(evidence, lr, limit) for lr in evidence.values("depths", "lr")]
        late = [each.mean for each in conditions if "warm-up" in each.label and each.mean is not None]
        more = f" After a long warm-up, post-norm ends at {span(late, '.2f')} bits per byte." if late else ""
        return f"{' '.join(shares)}{more} The unigram baseline is {evidence.unigram:.2f} bits per byte."

    return card(
        "C4",
        "Post-norm is unstable beyond 12 layers.",
        f"Whether post-norm with more than {LIMIT} blocks stays above {LEARNED:g} of the unigram baseline's bits per byte, "
        "with the usual warm-up of a tenth of the run and with a warm-up of half the run.",
        questions,
        found,
        "Xiong et al. 2020 show that post-norm needs warm-up and small learning rates; Wang et al. 2019 could not train 20 "
        "post-norm layers. The largest depth that trains depends on learning rate, warm-up and training length.",
    )


def _where(row: Row, evidence: Evidence) -> str:
    late = row in evidence.rows("warm-up")
    return f"{blocks(row.variant['depth'])}, learning rate {row.variant['lr']:g}{', long warm-up' if late else ''}"


def _by_rate(evidence: Evidence, lr: float, limit: float) -> str:
    """Return the shares of post-norm and pre-norm runs that learn at a learning rate, by depth."""
    shares = []
    for place in ("post", "pre"):
        by_depth = {
            row.variant["depth"]: list(values(row, score).values())
            for row in evidence.rows("depths", placement=place, lr=lr)
        }
        share = {depth: mean([each < limit for each in found]) for depth, found in by_depth.items() if found}
        percent = {depth: f"{100 * share[depth]:.0f} %" for depth in sorted(share)}
        by_depth_text = ", ".join(f"{value} with {blocks(depth)}" for depth, value in percent.items())
        same = len(percent) > 1 and len(set(percent.values())) == 1
        shares.append(
            f"{place}-norm {percent[max(percent)]} at every depth" if same else f"{place}-norm {by_depth_text}"
        )
    return f"Runs that learn at learning rate {lr:g}: {'; '.join(shares)}."
