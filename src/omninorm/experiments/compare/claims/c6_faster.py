"""C6: pre-norm converges faster than post-norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import DEPTHS, card, one
from omninorm.experiments.compare.evidence import Evidence, Outcome

STUDIES = [DEPTHS]
_WINDOW = 10  # steps that a loss is averaged over


def judge(evidence: Evidence) -> Card:
    questions = []
    for lr in evidence.values("depths", "lr"):
        for depth in evidence.values("depths", "depth"):
            pre, post = (one(evidence.rows("depths", placement=place, depth=depth, lr=lr)) for place in ("pre", "post"))
            shared = [] if pre is None or post is None else [seed for seed in pre.outcomes if seed in post.outcomes]
            samples = [_log_ratio(pre.outcomes[seed], post.outcomes[seed]) for seed in shared if pre and post]
            questions.append(
                Question(
                    f"{depth} blocks, rate {lr:g}", samples, 0.0, False, "pre-norm's steps over post-norm's", "log"
                )
            )

    def found(conditions: Sequence[Condition]) -> str:
        said = "; ".join(f"{each.label}: {math.exp(each.mean):.2f}" for each in conditions if each.mean is not None)
        return f"Steps that pre-norm needs to the loss which both reach, over those of post-norm: {said}."

    return card(
        "C6",
        "Pre-norm converges faster than post-norm.",
        "The steps until the training loss, averaged over 10 steps, first is as low as the worse of the two runs ever gets; "
        "same weights, batches and rate.",
        questions,
        found,
        "Xiong et al. 2020 find pre-norm faster, and without warm-up; others find shallow post-norm models that end better.",
    )


def _log_ratio(pre: Outcome, post: Outcome) -> float:
    """ln(steps of pre / steps of post) to the level that both reach. A run that is lost takes all the steps there are."""
    ours, theirs = _smooth(pre["losses"]), _smooth(post["losses"])
    level = max(min(ours.values(), default=-math.inf), min(theirs.values(), default=-math.inf))
    steps = max(len(pre["losses"]), len(post["losses"]))
    return math.log(_first(ours, level, steps) / _first(theirs, level, steps))


def _smooth(losses: Sequence[float | None]) -> dict[int, float]:
    """The mean of the losses up to a step, by step; empty for a run that did not end."""
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return {}
    width = min(_WINDOW, len(known))
    return {at: math.fsum(known[at - width : at]) / width for at in range(width, len(known) + 1)}


def _first(values: Mapping[int, float], level: float, otherwise: int) -> int:
    """The step at which the level is reached."""
    return next((step for step, value in values.items() if value <= level), otherwise)
