"""C7: γ lets the network undo the norm."""

from __future__ import annotations

from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import DEPTHS, LEARNED, NORMS, card, mean, score, values
from omninorm.experiments.compare.evidence import Evidence, Outcome, Row

STUDIES = [NORMS, DEPTHS]
LEFT = 0.01  # of Σ x²: a norm of which less is left has been undone
NAMES = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}


def judge(evidence: Evidence) -> Card:
    questions, learned = [], []
    for row in [*evidence.rows("norms"), *evidence.rows("depths", placement="post")]:
        samples = list(values(row, _best).values())
        # A model that has not learned has no streams to speak of.
        if samples and mean(list(values(row, score).values())) < LEARNED * evidence.unigram:
            questions.append(Question(_where(row), samples, LEFT, False, "share of Σ x² that the best γ leaves"))
            learned += list(values(row, _learned).values())

    def found(conditions: Sequence[Condition]) -> str:
        said = "; ".join(f"{each.label}: {100 * each.mean:.2g} %" for each in conditions if each.mean is not None)
        return (
            f"Of a trained model's streams the best γ leaves {said}. A norm divides every token by a number of its own, "
            "and γ has one number for all tokens: it undoes the norm exactly where all tokens are equally large. The γ that "
            f"training finds leave {100 * mean(learned):.0f} % on average: undoing is not what they are used for."
        )

    return card(
        "C7",
        "The learned γ lets the network undo the normalization.",
        f"What is left of undoing each norm of a trained model with the γ (and β) that undo it best; up to {100 * LEFT:g} % "
        "counts as undone.",
        questions,
        found,
        "Of a single vector the claim is true, which is how the chapter shows it.",
    )


def _where(row: Row) -> str:
    norm, place = NAMES[row.variant["normalization"]], row.variant["placement"]
    return f"{norm}, {place}-norm, {row.variant['depth']} blocks, rate {row.variant['lr']:g}"


def _best(outcome: Outcome) -> float | None:
    return None if outcome["undo"] is None else outcome["undo"]["best"]


def _learned(outcome: Outcome) -> float | None:
    return None if outcome["undo"] is None else outcome["undo"]["learned"]
