"""C5: pre-norm trains 100 layers and more."""

from __future__ import annotations

from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import (
    LEARNED,
    TRAINED,
    blocks,
    card,
    differences,
    mean,
    one,
    score,
    values,
)
from omninorm.experiments.compare.evidence import Evidence

STUDIES = [
    {
        "name": "deep",
        "protocol": "train",
        "depth": [26, 104],
        "lr": [0.003],
        "seeds": 5,
        "settings": TRAINED,
    }
]


def judge(evidence: Evidence) -> Card:
    depths = sorted(evidence.values("deep", "depth"))
    by_depth = {depth: values(one(evidence.rows("deep", placement="pre", depth=depth)), score) for depth in depths}
    limit = LEARNED * evidence.unigram
    questions = [
        Question(f"{blocks(depth)}", list(by_depth[depth].values()), limit, False, "bits per byte")
        for depth in depths
        if depth >= 100
    ]

    def found(conditions: Sequence[Condition]) -> str:
        means = ", ".join(f"{mean(list(by_depth[depth].values())):.3f} with {blocks(depth)}" for depth in depths)
        sentence = f"Held-out bits per byte: {means}; the unigram baseline is {evidence.unigram:.3f}."
        if len(depths) > 1:
            loss = mean(differences(by_depth[depths[-1]], by_depth[depths[0]]))
            compared = f"{abs(loss):.3f} {'worse' if loss > 0 else 'better'} than the shallowest"
            sentence += f" The deepest stack is {compared}: training a deep stack is not the same as gaining from it."
        return sentence

    return card(
        "C5",
        "Pre-norm trains stacks of 100 or more layers.",
        f"Whether a pre-norm stack of 100 or more blocks reaches less than {LEARNED:g} of the unigram baseline's bits per byte.",
        questions,
        found,
        "Curse of Depth (Sun et al. 2025) finds that the later blocks of deep pre-norm models contribute little.",
    )
