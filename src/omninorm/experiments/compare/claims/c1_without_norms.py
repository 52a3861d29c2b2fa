"""C1: without norms deep stacks explode or vanish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from omninorm.experiments.compare.cards import NO, YES, Card, Condition, Question
from omninorm.experiments.compare.claims.common import LEARNED, TINY, TRAINED, card, one, score, values
from omninorm.experiments.compare.evidence import Evidence, Outcome

START, TRAIN = "without-norms-start", "without-norms"
STUDIES: list[dict[str, Any]] = [
    {
        "name": START,
        "protocol": "init",
        "normalization": ["rmsnorm", "none"],
        "placement": ["pre", "none"],
        "depth": [8, 16, 32],
        "seeds": 5,
        "vary": {"init": ["xavier", "normal"]},
        "settings": TINY,
    },
    {
        "name": TRAIN,
        "protocol": "train",
        "normalization": ["rmsnorm", "none"],
        "placement": ["pre", "none"],
        "depth": [16],
        "seeds": 4,
        "vary": {"init": ["xavier", "normal"]},
        "settings": TRAINED,
    },
]
STARTS = {"xavier": "Xavier's start", "normal": "a start of deviation 0.02"}
# Over the whole stack, tenfold: an order of magnitude.
FOLD = math.log(10.0)
# What is not finite grew at least so much.
_OVERFLOW = math.log(3.4e38)


def judge(evidence: Evidence) -> Card:
    questions = []
    for start in evidence.values(START, "init"):
        depth = max(evidence.values(START, "depth"))
        rows = evidence.rows(START, normalization="none", init=start, depth=depth)
        label = f"the stream with {STARTS[start]}, {depth} blocks"
        samples = [change for row in rows for change in values(row, _change).values()]
        questions.append(
            Question(label, samples, FOLD, True, "last block's stream over the first's, or its inverse", "log")
        )
    for start in evidence.values(TRAIN, "init"):
        for depth in evidence.values(TRAIN, "depth"):
            found = one(evidence.rows(TRAIN, normalization="none", init=start, depth=depth))
            label = f"training with {STARTS[start]}, {depth} blocks"
            samples = list(values(found, score).values())
            questions.append(Question(label, samples, LEARNED * evidence.unigram, True, "bits per byte"))
    return card(
        "C1",
        "Without normalization the layers of a deep network explode or vanish, and training fails.",
        "The stream's RMS after each block of a stack without norms, before the first step; and whether training "
        f"comes below {LEARNED:g} of the bits per byte that byte frequencies alone have.",
        questions,
        _found,
        "Norm-free training is known to work with a start made for it (ReZero, Fixup, T-Fixup) or with pointwise functions "
        "in the norms' place (DyT, Derf), so the claim can only be one about standard starts.",
    )


def _change(outcome: Outcome) -> float:
    """|ln| of the last block's stream over the first's."""
    first, *_, last = outcome["stream_rms"]
    if first is None or last is None or not first * last:
        return _OVERFLOW
    return abs(math.log(last / first))


def _found(conditions: Sequence[Condition]) -> str:
    said = []
    for each in conditions:
        if each.mean is None:
            continue
        if each.scale == "log":
            said.append(f"{each.label}: it changes by a factor of {math.exp(each.mean):.3g}")
        else:
            fails = "it does not learn" if each.mean >= each.threshold / LEARNED else "it hardly learns"
            learns = {YES: fails, NO: "it learns"}.get(each.outcome, "unclear")
            said.append(f"{each.label}: {learns} ({each.mean:.2f} bits per byte)")
    return f"Without norms, {'; '.join(said)}."
