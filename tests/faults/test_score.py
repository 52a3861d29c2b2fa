"""Scoring of the board: detection, cause and layer of faulty runs, false alarms of healthy ones, and the plan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import run as runs
from faults.architectures import ARCHITECTURES, CALIBRATION, HELD_OUT
from faults.baselines import first_nan, first_outlier
from faults.board import BEFORE, PAGE, RESULTS, packed, read_results
from faults.faults import fault, load_faults
from faults.page import page, text_of
from faults.plan import SEEDS, faulty_cases, grouped, healthy_cases, selected
from faults.run import Case, has_effect
from faults.score import health, is_layer, judge, outlier_recall, score
from faults.training import Training

FAULT = "attention silent later"  # causes: branch-silent, odd-block; it has a layer
NAN = "NaN in a weight"


def alarm(step: int, rule: str, layer: str | None = None, severity: str = "fail") -> list[Any]:
    return [step, severity, rule, layer, ""]


def line(*alarms: list[Any], fault: str | None = FAULT, begins: int = 31, **values: Any) -> dict[str, Any]:
    name = fault or "healthy"
    base = {
        "key": f"llama/plain/0/{name}",
        "architecture": "llama",
        "variant": "plain",
        "seed": 0,
        "split": CALIBRATION,
    }
    found = {"fault": fault, "begins": begins, "layers": ["model.layers.2.self_attn"], "alarms": list(alarms)}
    return {**base, **found, "has_effect": True, "outlier": None, "nan": None, **values}


def test_alarm_before_the_fault_does_not_count() -> None:
    verdict = judge(line(alarm(29, "branch-silent", "model.layers.2")), None)
    assert not verdict.detected
    assert not verdict.cause
    assert verdict.layer is None


def test_alarm_of_the_healthy_twin_does_not_count() -> None:
    faulty = line(alarm(40, "branch-silent", "model.layers.2"))
    assert judge(faulty, line(fault=None)).detected
    assert not judge(faulty, line(alarm(40, "branch-silent", "model.layers.2"), fault=None)).detected
    assert judge(faulty, line(alarm(40, "branch-silent", "model.layers.1"), fault=None)).detected
    assert judge(faulty, line(alarm(50, "branch-silent", "model.layers.2"), fault=None)).detected


def test_first_fail_leads_even_after_a_warning() -> None:
    verdict = judge(line(alarm(33, "loss-spike", severity="warn"), alarm(60, "branch-silent", "model.layers.2")), None)
    assert verdict.leading == "branch-silent"
    assert verdict.cause
    assert verdict.steps == 2


def test_warning_from_which_the_first_fail_follows_leads() -> None:
    right = alarm(40, "branch-silent", "model.layers.2", "warn")
    follows = [*alarm(50, "depth-growth"), [40, "branch-silent", "model.layers.2"]]
    verdict = judge(line(alarm(35, "loss-spike", severity="warn"), right, follows), None)
    assert verdict.leading == "branch-silent"
    assert verdict.cause
    assert judge(line(right, [*follows[:5], [40, "loss-spike", None]]), None).leading == "depth-growth"


def test_wrong_fail_is_not_excused_by_a_right_warning() -> None:
    verdict = judge(line(alarm(40, "branch-silent", "model.layers.2", "warn"), alarm(50, "learning-rate")), None)
    assert not verdict.cause
    assert verdict.named


def test_generic_alarm_detects_but_does_not_name_the_cause() -> None:
    verdict = judge(line(alarm(35, "unrecovered-spike", severity="warn")), None)
    assert verdict.detected
    assert not verdict.cause
    assert not verdict.named


def test_rule_of_several_causes_must_begin_with_the_right_words() -> None:
    def cause_of(evidence: str) -> bool:
        found = [*alarm(70, "no-progress", severity="warn")[:4], evidence]
        return judge(line(found, fault="learning rate 0 from the start", begins=1), None).cause

    assert cause_of("Learning rate 0, no weight changes: over 60 steps")
    assert not cause_of("The loss has not fallen: over 60 steps")


@pytest.mark.parametrize(
    ("named", "right"),
    [
        ("model.layers.2.self_attn", True),
        ("model.layers.2.self_attn.q_proj.weight", True),
        ("model.layers.2", True),
        ("model.layers.2.mlp", False),
        ("model.layers.20", False),
        ("model.layers", False),
        ("model", False),
        (None, False),
    ],
)
def test_layer_is_the_module_a_part_of_it_or_its_block(named: str | None, right: bool) -> None:
    assert is_layer(named, ["model.layers.2.self_attn"]) is right


def test_layer_is_judged_only_if_the_cause_is_named() -> None:
    assert judge(line(alarm(40, "branch-silent", "model.layers.2")), None).layer is True
    assert judge(line(alarm(40, "branch-silent", "model.layers.1")), None).layer is False
    assert judge(line(alarm(40, "loss-spike", "model.layers.2")), None).layer is None


def test_score_leaves_out_runs_without_effect() -> None:
    right = judge(line(alarm(40, "branch-silent", "model.layers.2")), None)
    wrong = judge(line(alarm(60, "learning-rate")), None)
    missed = judge(line(), None)
    harmless = judge(line(alarm(40, "branch-silent", "model.layers.2"), has_effect=False), None)
    found = score([right, wrong, missed, harmless])
    assert (found.recall, found.cause, found.layer) == ((2, 3), (1, 3), (1, 1))
    assert found.soon == (1, 3)
    assert found.median == (9 + 29) / 2
    assert found.without_effect == 1


def test_health_counts_runs_not_alarms() -> None:
    healthy = [
        line(fault=None),
        line(alarm(10, "eps-share", "a"), alarm(20, "eps-share", "b"), alarm(30, "logz", severity="warn"), fault=None),
        line(alarm(10, "logz", severity="warn"), fault=None),
        line(alarm(10, "logz")),
    ]
    low = line(alarm(60, "no-progress", severity="warn"), fault=None, variant="tiny learning rate")
    found = health([*healthy, low])
    assert (found.runs, found.fails, found.warnings) == (3, 1, 1)
    assert found.rules == {("fail", "eps-share"): 1, ("warn", "logz"): 2}


# Effects and baselines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("loss", 0.002, False), ("loss", 0.02, True), ("loss", None, True), ("weights", 0.5, True), ("part", 1.0, True)],
)
def test_effect_needs_a_difference_or_a_value_that_is_not_finite(
    name: str, value: float | None, expected: bool
) -> None:
    assert has_effect({"loss": 0.0, "evaluation": 0.0, "weights": 0.0, "part": 0.0, name: value}) is expected


def test_tensor_that_did_not_move_is_a_whole_part() -> None:
    initial = {"a": torch.zeros(4), "b": torch.zeros(400)}
    twin = {"a": torch.ones(4), "b": torch.ones(400)}
    total, part = runs._distances({"a": torch.zeros(4), "b": torch.ones(400)}, twin, initial)
    assert part == pytest.approx(1.0)
    assert total == pytest.approx(math.sqrt(4 / 404))


def test_other_direction_of_the_same_length_is_no_difference_of_a_part() -> None:
    initial, twin = {"a": torch.zeros(4)}, {"a": torch.ones(4)}
    total, part = runs._distances({"a": -torch.ones(4)}, twin, initial)
    assert (total, part) == (2.0, 0.0)


def test_outlier_is_six_standard_deviations_above_the_past() -> None:
    calm = [3.0, 3.1] * 20
    assert first_outlier([*calm, 3.2]) is None
    assert first_outlier([*calm, 3.5]) == 41
    assert first_outlier([5.0, 9.0]) is None
    assert (first_outlier([5.0, math.nan]), first_nan([5.0, math.nan])) == (2, 2)


def test_outlier_before_the_fault_is_not_a_detection() -> None:
    found = [judge(line(outlier=20), None), judge(line(outlier=31), None)]
    assert outlier_recall(found) == (1, 2)


# The plan -------------------------------------------------------------------------------------------------------------


def test_board_is_as_large_as_promised() -> None:
    assert len(load_faults()) >= 45
    assert len(ARCHITECTURES) >= 20
    assert len(faulty_cases()) >= 400
    assert len(healthy_cases()) >= 200
    for split in (CALIBRATION, HELD_OUT):
        assert sum(a.split == split for a in ARCHITECTURES.values()) >= 10


def test_name_of_a_fault_is_used_once() -> None:
    def another(training: Training) -> None:
        """Do nothing."""

    with pytest.raises(ValueError, match="registered already"):
        fault(FAULT, "architecture", set())(another)
    with pytest.raises(ValueError, match="not a family"):
        fault("another", "weather", set())(another)


def test_halves_share_neither_architectures_nor_seeds() -> None:
    halves = [{(c.architecture, c.seed) for c in selected(split, None)} for split in (CALIBRATION, HELD_OUT)]
    for part in (0, 1):
        assert {pair[part] for pair in halves[0]}.isdisjoint(pair[part] for pair in halves[1])
    assert not set(SEEDS[CALIBRATION]) & set(SEEDS[HELD_OUT])


def test_limit_spreads_runs_over_all_faults() -> None:
    first = faulty_cases(limit=len(load_faults()))
    assert {case.fault for case in first} == set(load_faults())
    assert faulty_cases(limit=7) == faulty_cases()[:7]


def test_every_faulty_run_has_its_healthy_twin() -> None:
    chosen = selected(CALIBRATION, 50)
    assert {case.twin for case in chosen if case.fault} <= {case for case in chosen if not case.fault}
    assert sorted(case.key for group in grouped(chosen) for case in group) == sorted(case.key for case in chosen)


def test_cut_off_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line()) + "\n" + json.dumps(line())[:-9])
    assert read_results(path) == [line()]
    assert read_results(tmp_path / "missing.jsonl") == []


def test_packed_line_is_read_back_whole(tmp_path: Path) -> None:
    lines = [line(alarm(40, "logz")), line(fault=None, first=5.5), line(outlier=40)]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(packed(each)) + "\n" for each in lines))
    assert read_results(path) == lines
    assert "architecture" not in path.read_text()


def test_page_is_that_of_the_committed_results() -> None:
    expected = text_of(read_results(RESULTS), read_results(BEFORE))
    assert PAGE.read_text(encoding="utf-8") == expected, "run: PYTHONPATH=tests python -m faults.board --page"


def test_page_counts_and_lists_misses() -> None:
    text = "\n".join(page([line(), line(alarm(20, "logz", severity="warn"), fault=None, outlier=None)]))
    assert "| calibration | 1 | 0/1 (0 %) |" in text
    assert f"| {FAULT} | calibration | llama | – |" in text
    assert "| calibration | warn | `logz` | 1 | llama |" in text
    assert Case("llama", 0).key == "llama/plain/0/healthy"
