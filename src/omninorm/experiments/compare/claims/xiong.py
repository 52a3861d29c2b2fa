"""Published: gradients of the last layer by depth before training (Xiong et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import TINY, card, one
from omninorm.experiments.compare.evidence import Evidence

STUDIES = [
    {
        "name": "gradients",
        "protocol": "init",
        "normalization": ["layernorm"],
        "placement": ["pre", "post"],
        "depth": [4, 8, 16, 32, 64],
        "seeds": 8,
        # Theory is of wide layers and a head of its own.
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
            label = f"{place}-norm's slope {'above' if above else 'below'} {bound:g}"
            questions.append(Question(label, samples, bound, above, "slope of ln gradient norm by ln blocks"))

    def found(conditions: Sequence[Condition]) -> str:
        pre, post = (next(each for each in conditions if each.label.startswith(place)) for place in THEORY)
        return (
            f"Slope of the last block's gradient norm by depth, both logarithms: pre-norm {_interval(pre)}, where theory "
            f"says −0.5; post-norm {_interval(post)}, where it says 0."
        )

    return card(
        "Xiong",
        "Before training, the last layer's gradient is the same at any depth in post-norm and falls as 1/√depth in pre-norm.",
        f"Gradient norms of the last block, LayerNorm, 4 to 64 blocks; the slope is to be within {NEAR:g} of theory.",
        questions,
        found,
        "Xiong et al. 2020, arXiv 2002.04745, for queries and keys of zero and the last feed-forward; here queries and keys "
        "start as they do in training, and the whole block counts.",
    )


def slopes(evidence: Evidence, place: str) -> list[float]:
    """The slope of every seed, by least squares over the depths."""
    depths = evidence.values("gradients", "depth")
    rows = [one(evidence.rows("gradients", placement=place, depth=depth)) for depth in depths]
    known = [row for row in rows if row is not None]
    seeds = set.intersection(*(set(row.outcomes) for row in known)) if known else set()
    if len(known) < 2:
        return []
    xs = [math.log(row.variant["depth"]) for row in known]
    return [_slope(xs, [math.log(row.outcomes[seed]["grad_norms"][-1]) for row in known]) for seed in sorted(seeds)]


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    middle = math.fsum(xs) / len(xs)
    return math.fsum((x - middle) * y for x, y in zip(xs, ys, strict=True)) / math.fsum((x - middle) ** 2 for x in xs)


def _interval(each: Condition) -> str:
    if each.low is None or each.high is None:
        return f"{each.mean:.2f}"
    return f"{each.mean:.2f} ({each.low:.2f} … {each.high:.2f})"
