"""C7: γ lets the network undo the norm."""

from __future__ import annotations

from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import DEPTHS, LEARNED, NORMS, blocks, card, mean, score, span, values
from omninorm.experiments.compare.evidence import Evidence, Outcome, Row

STUDIES = [NORMS, DEPTHS]
LEFT = 0.01  # share of Σx²: if less than this remains, the norm counts as undone
NAMES = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}


def judge(evidence: Evidence) -> Card:
    questions, learned = [], []
    for row in [*evidence.rows("norms"), *evidence.rows("depths", placement="post")]:
        samples = list(values(row, _best).values())
        # The residual stream of a model that has not learned is no evidence.
        if samples and mean(list(values(row, score).values())) < LEARNED * evidence.unigram:
            questions.append(Question(_where(row), samples, LEFT, False, "share of Σx² that the best γ leaves"))
            learned += list(values(row, _learned).values())

    def found(conditions: Sequence[Condition]) -> str:
        left = ", ".join(
            f"{span(shares, '#.2g')} % with {place}-norm"
            for place in ("pre", "post")
            if (shares := _left(conditions, place))
        )
        return (
            f"The best possible γ leaves a share of the residual stream's energy Σx² unexplained: {left}. A norm divides each "
            "token by that token's own RMS, whereas γ is the same for all tokens, so γ can undo a norm only if all tokens have "
            f"the same RMS. The γ that training finds leaves {100 * mean(learned):.0f} % on average: training does not "
            "use γ to undo the norm."
        )

    return card(
        "C7",
        "The learned γ lets the network undo the normalization.",
        "The share of Σx² that remains when each norm of a trained model is undone with the best possible γ (and β). Up to "
        f"{100 * LEFT:g} % counts as undone.",
        questions,
        found,
        "For a single vector the claim is true, and the chapter demonstrates it on one.",
    )


def _where(row: Row) -> str:
    norm, place = NAMES[row.variant["normalization"]], row.variant["placement"]
    return f"{norm}, {place}-norm, {blocks(row.variant['depth'])}, learning rate {row.variant['lr']:g}"


def _left(conditions: Sequence[Condition], place: str) -> list[float]:
    """Return the means of a placement's conditions in percent."""
    return [100 * each.mean for each in conditions if each.mean is not None and f"{place}-norm" in each.label]


def _best(outcome: Outcome) -> float | None:
    return None if outcome["undo"] is None else outcome["undo"]["best"]


def _learned(outcome: Outcome) -> float | None:
    return None if outcome["undo"] is None else outcome["undo"]["learned"]
