"""C2: RMSNorm needs 4 operations instead of LayerNorm's 7, and is 15 to 20 % faster."""

from __future__ import annotations

from collections.abc import Sequence

from omninorm.experiments.compare.cards import Card, Condition, Question
from omninorm.experiments.compare.claims.common import card, mean
from omninorm.experiments.compare.evidence import Evidence

STUDIES = [
    {
        "name": "speed",
        "protocol": "speed",
        "depth": [4],
        "seeds": 5,
        "settings": {"d_model": 256, "n_heads": 4, "seq_len": 128, "batch_size": 4, "feed_forward": "gelu"},
    }
]
CLAIMED_OPERATIONS, CLAIMED_SPEED = 7 / 4, 1.15
PLACES = {
    "norm": "omninorm's norm alone",
    "norm, torch.nn": "torch.nn's norm alone",
    "block": "whole block",
    "step": "training step",
}


def judge(evidence: Evidence) -> Card:
    rows = evidence.rows("speed", normalization="rmsnorm")
    counted = [outcome["operations"] for row in rows for outcome in row.outcomes.values()]
    operations = [each["layernorm"]["per_element"] / each["rmsnorm"]["per_element"] for each in counted]
    # A ratio of exactly 7/4 confirms the claim, so it must count as above the threshold.
    questions = [
        Question(
            "operations per element",
            operations,
            CLAIMED_OPERATIONS * (1 - 1e-9),
            True,
            "LayerNorm's operations / RMSNorm's",
        )
    ]
    for place, label in PLACES.items():
        clocks = [clock.get("ratios", {}) for row in rows for clock in row.clocks.values()]
        samples = [ratios[place] for ratios in clocks if ratios.get(place) is not None]
        if samples:
            questions.append(Question(label, samples, CLAIMED_SPEED, True, "LayerNorm's time / RMSNorm's"))

    def found(conditions: Sequence[Condition]) -> str:
        per = {kind: mean([each[kind]["per_element"] for each in counted]) for kind in ("rmsnorm", "layernorm")}
        faster = ", ".join(f"{each.label} {each.mean:.2f}" for each in conditions[1:] if each.mean is not None)
        return (
            f"PyTorch's own operators decompose into {per['rmsnorm']:g} operations per element for RMSNorm and "
            f"{per['layernorm']:g} for LayerNorm (7 if the differences from the mean are stored). LayerNorm's time over "
            f"RMSNorm's (claimed: 1.15 to 1.20): {faster}."
        )

    return card(
        "C2",
        "RMSNorm needs 4d operations instead of LayerNorm's 7d and is 15 to 20 % faster in practice.",
        "Operations per row in PyTorch's operators; and the time of a forward and backward pass on one thread. The two "
        "norms alternate, and the result is the median of the ratios within a round.",
        questions,
        found,
        "The RMSNorm paper reports 6.9 to 40.8 % depending on the model, and 6.9 % for its Transformer. Norms are "
        "memory-bound and take a small share of a step; torch.nn.RMSNorm has no fused CPU kernel.",
    )
