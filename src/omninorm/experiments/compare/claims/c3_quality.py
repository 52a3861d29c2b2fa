"""C3: dropping the mean costs no quality."""

from __future__ import annotations

from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import (
    LEARNED,
    NORMS,
    blocks,
    card,
    differences,
    mean,
    one,
    score,
    span,
    values,
)
from omninorm.experiments.compare.evidence import Evidence

STUDIES = [NORMS]


def judge(evidence: Evidence) -> Card:
    margin = evidence.studies["norms"].margin if "norms" in evidence.studies else 0.02
    questions = []
    for depth in evidence.values("norms", "depth"):
        for lr in evidence.values("norms", "lr"):
            ours, theirs = (
                values(one(evidence.rows("norms", normalization=kind, depth=depth, lr=lr)), score)
                for kind in ("rmsnorm", "layernorm")
            )
            label = f"pre-norm, {blocks(depth)}, learning rate {lr:g}"
            # Models that have not learned are equally bad with any norm, so they are no evidence.
            learned = all(mean(list(each.values())) < LEARNED * evidence.unigram for each in (ours, theirs))
            samples = differences(ours, theirs) if learned else []
            questions.append(Question(label, samples, margin, False, "bits per byte"))

    def found(conditions: Sequence[Condition]) -> str:
        means = span([each.mean for each in conditions if each.mean is not None], "+.3f")
        return f"RMSNorm's held-out bits per byte minus LayerNorm's: {means}. Up to {margin:g} counts as no cost."

    return card(
        "C3",
        "Subtracting the mean is not needed: RMSNorm is as good as LayerNorm.",
        "Held-out bits per byte after training with either norm, from the same weights on the same batches.",
        questions,
        found,
        "The RMSNorm paper reports BLEU 26.8 against 26.6; OLMo 2 found no difference.",
    )
