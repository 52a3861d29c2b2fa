"""docs/claims.md and docs/placements: the page is made from the recorded results, and these agree with the code and sources.

The runs take half an hour (`omninorm compare --preset chapter`), so these tests read the recorded results.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omninorm.experiments.compare import Study, preset
from omninorm.experiments.compare.cards import verdict
from omninorm.experiments.compare.claims import CLAIMS
from omninorm.experiments.compare.evidence import Evidence, Row
from omninorm.experiments.compare.results import VALUES, judge_comparisons
from omninorm.report.comparison import read_comparison
from omninorm.report.comparison.markdown import figures, render

DOCS = Path(__file__).parents[3] / "docs"
RECORDED = DOCS / "claims"
CARDS = {card.id: card for card in read_comparison(RECORDED).claims}
UNIGRAM = read_comparison(RECORDED).text.unigram_bits_per_byte


def condition(claim: str, label: str):
    (found,) = [each for each in CARDS[claim].conditions if label in each.label]
    return found


def test_the_page_is_made_from_the_results() -> None:
    """Regenerate it with: omninorm report docs/claims --out docs/claims.md"""
    names = [path.name for path in RECORDED.glob("*.svg")]
    assert (DOCS / "claims.md").read_text(encoding="utf-8") == render(read_comparison(RECORDED), "claims", names)


@pytest.mark.slow
def test_the_figures_are_made_from_the_results() -> None:
    drawn = dict(figures(read_comparison(RECORDED)))
    assert {path.name for path in RECORDED.glob("*.svg")} == set(drawn)


def test_the_recorded_plan_is_the_preset() -> None:
    recorded = json.loads((RECORDED / "results.json").read_text())["plan"]
    now = json.loads(preset("chapter").model_dump_json(exclude={"text"}))
    assert recorded == now


def test_every_claim_has_a_verdict() -> None:
    assert [claim for claim in CARDS if claim.startswith("C")] == [f"C{number}" for number in range(1, 8)]


def test_a_stack_of_more_than_a_hundred_blocks_learns() -> None:
    found = condition("C5", "104 blocks")
    assert found.outcome == "yes"
    assert found.high < found.threshold


@pytest.mark.parametrize("label", ["post-norm tolerates less than deepnorm", "deepnorm tolerates less than pre-norm"])
def test_deep_placements_tolerate_learning_rates_in_keels_order(label: str) -> None:
    """At 32 blocks post < deepnorm < pre."""
    assert condition("KEEL", label).low > 0


def test_qk_norm_reduces_the_sensitivity_to_the_learning_rate() -> None:
    (found,) = CARDS["qk-norm"].conditions
    assert found.high < 0


def test_layer_norm_scaling_reduces_the_streams_variance() -> None:
    (found,) = CARDS["lns"].conditions
    assert found.high < 0


def test_gradients_before_training_follow_theory() -> None:
    pre, post = CARDS["Xiong"].conditions[0], CARDS["Xiong"].conditions[2]
    assert -0.7 < pre.low < pre.high < -0.3
    assert -0.2 < post.low < post.high < 0.2


def test_without_norms_a_deep_stack_explodes() -> None:
    stream = condition("C1", "residual stream, Xavier")
    assert stream.low > stream.threshold


@pytest.mark.parametrize("claim", CLAIMS)
def test_recorded_texts_are_those_of_the_code(claim: str) -> None:
    """The sentences are stored in the results, so rewording a claim must also reword them."""
    card, plan = CARDS[claim], preset(claim)
    none = {study.name: tuple(Row(variant, {}, {}) for variant in study.variants()) for study in plan.studies}
    now = CLAIMS[claim].judge(Evidence({study.name: study for study in plan.studies}, none, UNIGRAM))
    assert (card.claim, card.measured, card.source) == (now.claim, now.measured, now.source)
    recorded = {(each.label, each.unit) for each in card.conditions}
    assert {(each.label, each.unit) for each in now.conditions} <= recorded
    assert card.verdict == verdict(card.conditions)


@pytest.mark.parametrize("folder", ["claims", "placements"])
def test_recorded_verdicts_are_those_of_the_code(folder: str) -> None:
    """They follow from the recorded values, intervals and outcomes."""
    results = json.loads((DOCS / folder / "results.json").read_text())
    for study in results["studies"]:
        grid = Study(name=study["name"], protocol=study["protocol"], margin=study["margin"])
        assert study["unit"] == VALUES[study["protocol"]][1]
        for row in study["configurations"] if study["protocol"] == "train" else ():
            limit = 0.9 * results["text"]["unigram_bits_per_byte"]
            learned = {seed: score < limit for seed, score in row["values"].items()}
            assert {seed: outcome == "learned" for seed, outcome in row["outcomes"].items()} == learned
            assert [seed for seed, outcome in row["outcomes"].items() if outcome == "diverged"] == row["lost"]
        if study["protocol"] != "init":
            recorded = [dict(each) for each in study["comparisons"]]
            judge_comparisons(grid, recorded, study["configurations"])
            assert [each["verdict"] for each in recorded] == [each["verdict"] for each in study["comparisons"]]


def test_a_placement_that_never_learns_is_worse_for_that_reason() -> None:
    """Post-norm ends at the unigram baseline at 12 blocks, in all five runs."""
    study, *_ = json.loads((DOCS / "placements" / "results.json").read_text())["studies"]
    verdicts = {each["label"]: each["verdict"] for each in study["comparisons"]}
    assert verdicts["rmsnorm post"] == "worse (no run learned)"
    assert verdicts["rmsnorm deepnorm"] == "worse"
