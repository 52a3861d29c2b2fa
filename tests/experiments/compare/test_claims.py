"""Every claim's judge on synthetic outcomes with a clear verdict, for and against the claim."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from omninorm.experiments.compare import PRESETS, parse_plan, preset
from omninorm.experiments.compare.claims import CLAIMS, studies_of
from omninorm.experiments.compare.claims.c6_faster import _log_ratio
from omninorm.experiments.compare.evidence import Evidence, Row

UNIGRAM = 4.4
Outcome = Callable[[Mapping[str, Any], float], dict[str, Any]]
WOBBLE = (-0.01, 0.02, 0.005, -0.015, 0.0, 0.01, -0.005, 0.015, -0.02, 0.01)


def evidence(claim: str, outcome: Outcome, clock: Outcome = lambda variant, wobble: {}) -> Evidence:
    """The claim's own studies, with outcomes made from a variant and a seed's wobble."""
    plan = parse_plan({"claims": [claim], "studies": studies_of([claim])}, "here")
    found = {}
    for study in plan.studies:
        rows = []
        for variant in study.variants():
            seeds = {seed: WOBBLE[seed] for seed in range(study.seeds)}
            outcomes = {seed: outcome(variant, wobble) for seed, wobble in seeds.items()}
            rows.append(Row(variant, outcomes, {seed: clock(variant, wobble) for seed, wobble in seeds.items()}))
        found[study.name] = tuple(rows)
    return Evidence({study.name: study for study in plan.studies}, found, UNIGRAM)


def scored(value: Callable[[Mapping[str, Any]], float], **more: Any) -> Outcome:
    return lambda variant, wobble: {"score": value(variant) + wobble, "initial_bits": 8.0, "undo": None, **more}


def is_post(variant: Mapping[str, Any]) -> bool:
    return variant["placement"] == "post"


def falling(steps: int) -> list[float]:
    """Return losses that fall from 8 to 3 within `steps` steps and then stay at 3."""
    return [8 - 5 * min(1.0, step / steps) for step in range(1, 201)]


def start(grown: float, bits: float) -> Outcome:
    return lambda variant, wobble: {"stream_rms": [1.0, 2.0, grown * (1 + wobble)], "score": bits + wobble}


def ramp(rates: Mapping[str, float]) -> Outcome:
    return lambda variant, wobble: {"largest_rate": rates[variant["placement"]] * (1 + wobble), "sign": None}


def gradients(pre: float, post: float) -> Outcome:
    return lambda variant, wobble: {
        "grad_norms": [9.0, variant["depth"] ** (post if is_post(variant) else pre) * (1 + wobble)]
    }


def undone(left: float) -> Outcome:
    return lambda variant, wobble: {"score": 3.0, "undo": {"best": left * (1 + wobble), "learned": 0.4}}


def streams(lns: float) -> Outcome:
    return lambda variant, wobble: {"stream_rms": [1.0, (lns if variant["placement"] == "lns" else 3.0) + wobble]}


def operations(layer_norm: float) -> Outcome:
    return lambda variant, wobble: {
        "operations": {"rmsnorm": {"per_element": 4.0}, "layernorm": {"per_element": layer_norm}}
    }


def even(variant: Mapping[str, Any], wobble: float) -> dict[str, Any]:
    """Now one is faster, now the other."""
    return {
        "losses": falling(round(60 * (1 + 8 * (wobble if is_post(variant) else -wobble)))),
        "score": 3.0,
        "undo": None,
    }


RATES = {"post": 3e-4, "deepnorm": 1e-3, "pre": 7e-3, "keel": 1e-2}
CASES: dict[str, list[tuple[Outcome, str]]] = {
    "C1": [(start(1e4, 4.4), "holds"), (start(1e-4, 4.4), "holds"), (start(1.5, 3.0), "does not hold here")],
    "C3": [
        (scored(lambda v: 3.0), "holds"),
        (scored(lambda v: 3.2 if v["normalization"] == "rmsnorm" else 3.0), "does not hold here"),
    ],
    "C4": [
        (scored(lambda v: 4.4 if is_post(v) and v["depth"] > 12 else 3.0), "holds"),
        (scored(lambda v: 3.0 if is_post(v) and v["depth"] > 12 else 4.4), "does not hold here"),
    ],
    "C5": [(scored(lambda v: 3.0), "holds"), (scored(lambda v: 4.4), "does not hold here")],
    "C6": [
        (even, "not enough evidence"),
        (
            lambda v, w: {"losses": falling(round((100 if is_post(v) else 40) * (1 + w))), "score": 3.0, "undo": None},
            "holds",
        ),
        (
            lambda v, w: {"losses": falling(round((40 if is_post(v) else 100) * (1 + w))), "score": 3.0, "undo": None},
            "does not hold here",
        ),
    ],
    "C7": [(undone(0.001), "holds"), (undone(0.2), "does not hold here")],
    "Xiong": [(gradients(-0.5, 0.0), "holds"), (gradients(0.0, 0.0), "holds in part (3 of 4 conditions)")],
    "KEEL": [
        (ramp(RATES), "holds"),
        (ramp(RATES | {"pre": 1e-4}), "holds in part (2 of 3 conditions)"),
    ],
    "qk-norm": [
        (scored(lambda v: 3.0 if v["qk_norm"] or v["lr"] < 0.1 else 7.0), "holds"),
        (scored(lambda v: 7.0 if v["qk_norm"] and v["lr"] >= 0.1 else 3.0), "does not hold here"),
    ],
    "lns": [(streams(2.0), "holds"), (streams(4.0), "does not hold here")],
}
FLAT = [(claim, outcome, said) for claim, cases in CASES.items() for outcome, said in cases]


@pytest.mark.parametrize(("claim", "outcome", "said"), FLAT, ids=lambda value: value if isinstance(value, str) else "")
def test_outcomes_decide_the_verdict_of_a_claim(claim: str, outcome: Outcome, said: str) -> None:
    card = CLAIMS[claim].judge(evidence(claim, outcome))
    assert card.id == claim
    assert card.verdict.startswith(said)
    assert card.found.endswith(".")
    assert "nan" not in card.found
    assert not re.search(r"\brates?\b", card.found.replace("learning rate", "")), "the term is learning rate"


@pytest.mark.parametrize(
    ("places", "counted", "said"),
    [
        ({"norm": 1.5, "norm, torch.nn": 1.3, "block": 1.2, "step": 1.2}, 7.0, "holds"),
        (
            {"norm": 1.5, "norm, torch.nn": 0.3, "block": 1.02, "step": 1.0},
            8.0,
            "holds in part (2 of 5 conditions)",
        ),
        ({"norm": 1.0, "norm, torch.nn": 0.3, "block": 1.0, "step": 1.0}, 4.0, "does not hold here"),
    ],
)
def test_times_decide_the_verdict_on_speed(places: dict[str, float], counted: float, said: str) -> None:

    def clock(variant: Mapping[str, Any], wobble: float) -> dict[str, Any]:
        return {"ratios": {name: value + wobble for name, value in places.items()}}

    card = CLAIMS["C2"].judge(evidence("C2", operations(counted), clock))
    assert card.verdict == said
    assert f"{counted:g} for LayerNorm" in card.found


def test_every_claim_has_a_case_for_and_against_it() -> None:
    assert set(CASES) | {"C2"} == set(CLAIMS)
    assert all(len({said for _, said in cases}) > 1 for cases in CASES.values())


@pytest.mark.parametrize("claim", CLAIMS)
def test_without_outcomes_there_is_no_verdict(claim: str) -> None:
    plan = parse_plan({"claims": [claim], "studies": studies_of([claim])}, "here")
    empty = {study.name: tuple(Row(variant, {}, {}) for variant in study.variants()) for study in plan.studies}
    card = CLAIMS[claim].judge(Evidence({study.name: study for study in plan.studies}, empty, UNIGRAM))
    assert card.verdict.startswith("not enough evidence")
    assert card.found == "Nothing was measured that could be judged."


def test_models_that_have_not_learned_are_no_evidence_for_equal_quality() -> None:
    card = CLAIMS["C3"].judge(evidence("C3", lambda variant, wobble: {"score": 8.0}))
    assert card.verdict.startswith("not enough evidence")


def test_steps_are_counted_to_the_level_that_both_runs_reach() -> None:
    """A run that falls to 3 in 50 steps, and one that only gets to 5.5, which takes it 100: the first is there after 25."""
    fast = {"losses": falling(50)}
    slow = {"losses": [8 - 2.5 * min(1.0, step / 100) for step in range(1, 201)]}
    assert math.e ** -_log_ratio(fast, slow) == pytest.approx(100 / 25, rel=0.15)
    assert _log_ratio(slow, fast) == pytest.approx(-_log_ratio(fast, slow))


def test_a_diverged_run_counts_with_all_steps() -> None:
    """It counts with all steps of the other run."""
    assert _log_ratio({"losses": falling(50)}, {"losses": [8.0, None]}) == pytest.approx(math.log(50 / 200), abs=0.2)


def test_presets_contain_the_studies_of_their_claims() -> None:
    for name in PRESETS:
        plan = preset(name)
        assert len(plan.cells()) > 5
    assert {study.name for study in preset("chapter").studies} == {study["name"] for study in studies_of(list(CLAIMS))}
    assert [study.name for study in preset("C3").studies] == ["norms"]
