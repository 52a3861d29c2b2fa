"""C6: pre-norm converges faster than post-norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from omninorm.experiments.compare.cards import NO, YES, Card, Condition, Question
from omninorm.experiments.compare.claims.common import DEPTHS, blocks, card, one, span
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
            label = f"{blocks(depth)}, learning rate {lr:g}"
            questions.append(Question(label, samples, 0.0, False, "pre-norm's steps / post-norm's", "log"))

    def found(conditions: Sequence[Condition]) -> str:
        ratios = span([math.exp(each.mean) for each in conditions if each.mean is not None], ".2f")
        counted = {outcome: sum(each.outcome == outcome for each in conditions) for outcome in (YES, NO)}
        return (
            f"To reach the same training loss, pre-norm needs {ratios} times as many steps as post-norm. "
            f"It is faster in {counted[YES]} of {len(conditions)} settings and slower in {counted[NO]}."
        )

    return card(
        "C6",
        "Pre-norm converges faster than post-norm.",
        "The step at which the training loss, averaged over 10 steps, first reaches a level: the higher of the two runs' "
        "lowest losses. Both runs have the same weights, batches and learning rate.",
        questions,
        found,
        "Xiong et al. 2020 find pre-norm faster, even without warm-up; others report shallow post-norm models that end better.",
    )


def _log_ratio(pre: Outcome, post: Outcome) -> float:
    """Return ln(pre-norm's steps / post-norm's steps) to the level that both reach. A diverged run counts with all steps."""
    ours, theirs = _smooth(pre["losses"]), _smooth(post["losses"])
    level = max(min(ours.values(), default=-math.inf), min(theirs.values(), default=-math.inf))
    steps = max(len(pre["losses"]), len(post["losses"]))
    return math.log(_first(ours, level, steps) / _first(theirs, level, steps))


def _smooth(losses: Sequence[float | None]) -> dict[int, float]:
    """Return the mean of the last losses at each step; empty for a run that diverged."""
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return {}
    width = min(_WINDOW, len(known))
    return {at: math.fsum(known[at - width : at]) / width for at in range(width, len(known) + 1)}


def _first(values: Mapping[int, float], level: float, otherwise: int) -> int:
    """Return the first step at or below the level."""
    return next((step for step, value in values.items() if value <= level), otherwise)
