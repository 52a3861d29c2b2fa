"""C5: pre-norm trains 100 layers and more."""

from __future__ import annotations

from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import LEARNED, TRAINED, card, differences, mean, one, score, values
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
        Question(f"{depth} blocks", list(by_depth[depth].values()), limit, False, "bits per byte")
        for depth in depths
        if depth >= 100
    ]

    def found(conditions: Sequence[Condition]) -> str:
        means = ", ".join(f"{mean(list(by_depth[depth].values())):.3f} with {depth} blocks" for depth in depths)
        said = f"Held-out bits per byte: {means}, where byte frequencies need {evidence.unigram:.3f}."
        if len(depths) > 1:
            gain = mean(differences(by_depth[depths[-1]], by_depth[depths[0]]))
            said += f" The deepest differs from the shallowest by {gain:+.3f}, so training it and gaining by it are two things."
        return said

    return card(
        "C5",
        "Pre-norm trains stacks of 100 layers and more.",
        f"Whether a pre-norm stack of 100 blocks or more comes below {LEARNED:g} of the bits per byte of byte frequencies.",
        questions,
        found,
        "Curse of Depth (Sun et al. 2025) finds that in deep pre-norm models the later blocks do little.",
    )
