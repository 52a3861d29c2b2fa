"""Published: LayerNorm Scaling keeps the stream's variance below pre-norm's (Curse of Depth)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import TINY, blocks, card, differences, one, values
from omninorm.experiments.compare.evidence import Evidence, Outcome

STUDIES = [
    {
        "name": "stream",
        "protocol": "init",
        "placement": ["pre", "lns"],
        "depth": [32],
        "seeds": 5,
        "settings": TINY,
    }
]


def judge(evidence: Evidence) -> Card:
    questions = []
    for depth in evidence.values("stream", "depth"):
        lns, pre = (
            values(one(evidence.rows("stream", placement=place, depth=depth)), _last) for place in ("lns", "pre")
        )
        questions.append(
            Question(f"{blocks(depth)}", differences(lns, pre), 0.0, False, "lns's variance / pre-norm's", "log")
        )

    def found(conditions: Sequence[Condition]) -> str:
        ratios = ", ".join(
            f"{math.exp(each.mean):.2f} with {each.label}" for each in conditions if each.mean is not None
        )
        return f"The residual stream's mean square after the last block, lns's over pre-norm's: {ratios}."

    return card(
        "lns",
        "Scaling the norms by 1/√block keeps the residual stream's variance below that of pre-norm.",
        "The mean square of the residual stream after the last block before training, for the same weights with and without "
        "the scaling.",
        questions,
        found,
        "Curse of Depth (Sun et al. 2025): with the scaling, the variance grows more slowly than exponentially, and deep blocks "
        "learn.",
    )


def _last(outcome: Outcome) -> float | None:
    last = outcome["stream_rms"][-1]
    return 2 * math.log(last) if last else None
