"""docs/claims.md: made of the results beside it, and these say what the sources say, or the page tells the difference.

The runs take half an hour (`omninorm compare --preset chapter`), so what is tested here is what they left.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omninorm.experiments.compare import preset
from omninorm.report.comparison import read_comparison
from omninorm.report.comparison.markdown import render

DOCS = Path(__file__).parents[3] / "docs"
RECORDED = DOCS / "claims"
CARDS = {card.id: card for card in read_comparison(RECORDED).claims}


def condition(claim: str, label: str):
    (found,) = [each for each in CARDS[claim].conditions if label in each.label]
    return found


def test_the_page_is_made_of_the_results() -> None:
    """After a change: omninorm report docs/claims --out docs/claims.md"""
    assert (DOCS / "claims.md").read_text(encoding="utf-8") == render(read_comparison(RECORDED), "claims")


def test_the_results_are_of_the_preset_as_it_is() -> None:
    recorded = json.loads((RECORDED / "results.json").read_text())["plan"]
    now = json.loads(preset("chapter").model_dump_json(exclude={"text"}))
    assert recorded == now


def test_every_claim_has_a_verdict() -> None:
    assert [claim for claim in CARDS if claim.startswith("C")] == [f"C{number}" for number in range(1, 8)]


def test_a_stack_of_more_than_a_hundred_blocks_learns() -> None:
    found = condition("C5", "104 blocks")
    assert found.outcome == "yes"
    assert found.high < found.threshold


@pytest.mark.parametrize("label", ["post tolerates less than deepnorm", "deepnorm tolerates less than pre"])
def test_deep_placements_tolerate_rates_in_keels_order(label: str) -> None:
    """At 32 blocks post < deepnorm < pre."""
    assert condition("KEEL", label).low > 0


def test_qk_norm_makes_rates_matter_less() -> None:
    (found,) = CARDS["qk-norm"].conditions
    assert found.high < 0


def test_layer_norm_scaling_holds_the_stream_down() -> None:
    (found,) = CARDS["lns"].conditions
    assert found.high < 0


def test_gradients_before_training_follow_theory() -> None:
    pre, post = CARDS["Xiong"].conditions[0], CARDS["Xiong"].conditions[2]
    assert -0.7 < pre.low < pre.high < -0.3
    assert -0.2 < post.low < post.high < 0.2


def test_without_norms_a_deep_stack_explodes() -> None:
    assert condition("C1", "stream with Xavier").low > condition("C1", "stream with Xavier").threshold
