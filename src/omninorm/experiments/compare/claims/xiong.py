"""Published: the last layer's gradient at initialization, by depth (Xiong et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import TINY, card, one, values
from omninorm.experiments.compare.evidence import Evidence, Outcome

STUDIES = [
    {
        "name": "gradients",
        "protocol": "init",
        "normalization": ["layernorm"],
        "placement": ["pre", "post"],
        "depth": [4, 8, 16, 32, 64],
        "seeds": 8,
        # The theory assumes wide layers and an untied output head.
        "settings": {**TINY, "d_model": 64, "tied_head": False},
    }
]
THEORY = {"pre": -0.5, "post": 0.0}
NEAR = 0.2


def judge(evidence: Evidence) -> Card:
    questions = []
    for place, theory in THEORY.items():
        samples = slopes(evidence, place)
        for bound, above in ((theory - NEAR, True), (theory + NEAR, False)):
            label = f"{place}-norm slope {'above' if above else 'below'} {bound:g}"
            questions.append(Question(label, samples, bound, above, "slope of ln(gradient norm) over ln(blocks)"))

    def found(conditions: Sequence[Condition]) -> str:
        pre, post = (next(each for each in conditions if each.label.startswith(place)) for place in THEORY)
        return (
            "Slope of the last block's gradient norm over depth, on logarithmic scales: pre-norm "
            f"{_interval(pre)}, theory −0.5; post-norm {_interval(post)}, theory 0."
        )

    return card(
        "Xiong",
        "Before training, the last layer's gradient is the same at any depth in post-norm and falls as 1/√depth in pre-norm.",
        f"Gradient norms of the last block, LayerNorm, 4 to 64 blocks; the slope must be within {NEAR:g} of theory.",
        questions,
        found,
        "Xiong et al. 2020, arXiv 2002.04745, set queries and keys to zero and consider the last feed-forward layer; here "
        "queries and keys have their usual initialization, and the whole block counts.",
    )


def slopes(evidence: Evidence, place: str) -> list[float]:
    """Return the slope of every seed, by least squares over the depths; seeds without a positive gradient are left out."""
    depths = evidence.values("gradients", "depth")
    rows = [one(evidence.rows("gradients", placement=place, depth=depth)) for depth in depths]
    known = [row for row in rows if row is not None]
    by_depth = [values(row, _last) for row in known]
    seeds = set.intersection(*(set(each) for each in by_depth)) if by_depth else set()
    if len(known) < 2:
        return []
    xs = [math.log(row.variant["depth"]) for row in known]
    return [_slope(xs, [each[seed] for each in by_depth]) for seed in sorted(seeds)]


def _last(outcome: Outcome) -> float | None:
    """Return ln(gradient norm of the last block)."""
    norm = outcome["grad_norms"][-1]
    return math.log(norm) if norm else None


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    middle = math.fsum(xs) / len(xs)
    return math.fsum((x - middle) * y for x, y in zip(xs, ys, strict=True)) / math.fsum((x - middle) ** 2 for x in xs)


def _interval(each: Condition) -> str:
    if each.low is None or each.high is None:
        return f"{each.mean:.2f}"
    return f"{each.mean:.2f} ({each.low:.2f} … {each.high:.2f})"
