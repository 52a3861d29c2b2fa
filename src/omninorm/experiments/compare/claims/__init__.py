"""The chapter's seven claims and four published ones; each file has a claim's studies and the function that judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omninorm.experiments.compare.cards import Card
from omninorm.experiments.compare.claims import (
    c1_without_norms,
    c2_speed,
    c3_quality,
    c4_post_norm,
    c5_deep,
    c6_faster,
    c7_undo,
    keel,
    lns,
    qk_norm,
    xiong,
)
from omninorm.experiments.compare.evidence import Evidence


@dataclass(frozen=True)
class Claim:
    """A claim: its studies in the form of a plan, and the function that judges it.

    `timed` is true if the verdict depends on the clock.
    """

    studies: Sequence[Mapping[str, Any]]
    judge: Callable[[Evidence], Card]
    timed: bool = False


CLAIMS: dict[str, Claim] = {
    "C1": Claim(c1_without_norms.STUDIES, c1_without_norms.judge),
    "C2": Claim(c2_speed.STUDIES, c2_speed.judge, timed=True),
    "C3": Claim(c3_quality.STUDIES, c3_quality.judge),
    "C4": Claim(c4_post_norm.STUDIES, c4_post_norm.judge),
    "C5": Claim(c5_deep.STUDIES, c5_deep.judge),
    "C6": Claim(c6_faster.STUDIES, c6_faster.judge),
    "C7": Claim(c7_undo.STUDIES, c7_undo.judge),
    "Xiong": Claim(xiong.STUDIES, xiong.judge),
    "KEEL": Claim(keel.STUDIES, keel.judge),
    "qk-norm": Claim(qk_norm.STUDIES, qk_norm.judge),
    "lns": Claim(lns.STUDIES, lns.judge),
}


def studies_of(claims: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return all studies that the claims need, without duplicates."""
    found = {study["name"]: study for name in claims for study in CLAIMS[name].studies}
    return list(found.values())
