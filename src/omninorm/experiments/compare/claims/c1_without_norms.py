"""C1: without norms deep stacks explode or vanish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from omninorm.experiments.compare.cards import NO, YES, Card, Condition, Question
from omninorm.experiments.compare.claims.common import LEARNED, TINY, TRAINED, blocks, card, one, score, values
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
INITIALIZATIONS = {"xavier": "Xavier initialization", "normal": "std-0.02 initialization"}
# A factor of ten over the whole stack.
FOLD = math.log(10.0)
# The change that is assumed for a stream with infinite or zero values.
_OVERFLOW = math.log(3.4e38)


def judge(evidence: Evidence) -> Card:
    questions = []
    for init in evidence.values(START, "init"):
        depth = max(evidence.values(START, "depth"))
        rows = evidence.rows(START, normalization="none", init=init, depth=depth)
        label = f"residual stream, {INITIALIZATIONS[init]}, {blocks(depth)}"
        samples = [change for row in rows for change in values(row, _change).values()]
        questions.append(Question(label, samples, FOLD, True, "change of the residual stream over the stack", "log"))
    for init in evidence.values(TRAIN, "init"):
        for depth in evidence.values(TRAIN, "depth"):
            found = one(evidence.rows(TRAIN, normalization="none", init=init, depth=depth))
            label = f"training, {INITIALIZATIONS[init]}, {blocks(depth)}"
            samples = list(values(found, score).values())
            questions.append(Question(label, samples, LEARNED * evidence.unigram, True, "bits per byte"))
    return card(
        "C1",
        "Without normalization the layers of a deep network explode or vanish, and training fails.",
        "The RMS of the residual stream after each block of a stack without norms, before the first step; and whether "
        f"training reaches less than {LEARNED:g} of the unigram baseline's bits per byte.",
        questions,
        _found,
        "Norm-free training works with tailored initialization (ReZero, Fixup, T-Fixup) or with pointwise functions in "
        "place of norms (DyT, Derf), so the claim can only be about standard initializations.",
    )


def _change(outcome: Outcome) -> float:
    """Return |ln(RMS after the last block / RMS after the first block)|."""
    first, last = outcome["stream_rms"][0], outcome["stream_rms"][-1]
    if first is None or last is None or not first * last:
        return _OVERFLOW
    return abs(math.log(last / first))


def _found(conditions: Sequence[Condition]) -> str:
    sentences = []
    for each in conditions:
        if each.mean is None:
            continue
        setting = each.label.split(", ", 1)[1].replace(", ", " and ")
        if each.scale == "log":
            finding = f"the residual stream changes by a factor of {math.exp(each.mean):#.3g}"
        else:
            fails = "does not learn" if each.mean >= each.threshold / LEARNED else "hardly learns"
            learns = {YES: fails, NO: "learns"}.get(each.outcome, "may or may not learn")
            finding = f"training {learns} ({each.mean:.2f} bits per byte)"
        sentences.append(f"With {setting}, {finding}.")
    return " ".join(sentences)
