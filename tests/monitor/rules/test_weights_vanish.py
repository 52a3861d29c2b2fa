"""weights-vanish: weight decay that dominates, gains that vanish, and weights that are reset to 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers.histories import facts, numbers_in
from helpers.tiny_runs import TinyGPT, named, of_rule, train_tiny
from torch import Tensor

from omninorm.monitor import Alarm, History, Sample
from omninorm.monitor.rules.weights_vanish import WeightsVanish

pytestmark = pytest.mark.usefixtures("words")
GROUPS = 5


def judge(
    weights: Sequence[Sequence[float]], decay: float | None = None, ratio: float = 0.01, every: int = 10
) -> list[list[Alarm]]:
    """Return the reports about samples with these weights of each group."""
    rule, history, reports = WeightsVanish(), History(facts=facts()), []
    for count, sizes in enumerate(weights):
        signals = {"weight_rms": sizes, "update_ratio": [ratio] * GROUPS}
        history.samples.append(Sample(max(every * count, 1), signals, decay=() if decay is None else [decay] * GROUPS))
        reports.append(list(rule.on_sample(history, history.samples[-1])))
    return reports


def shrinking(per_step: float, groups: Sequence[int] = range(GROUPS), count: int = 8) -> list[list[float]]:
    steps = [max(10 * number, 1) for number in range(count)]
    return [[0.1 * (1 - per_step) ** step if at in groups else 0.1 for at in range(GROUPS)] for step in steps]


def severities(reports: list[list[Alarm]]) -> list[list[str]]:
    return [[alarm.severity for alarm in alarms] for alarms in reports]


def test_decay_that_explains_the_fall_warns_at_one_and_a_half_and_fails_at_two_fold() -> None:
    # 0.98^19 = 0.68, 0.98^29 = 0.557, 0.98^39 = 0.455; 2-fold at steps 40, 50 and 60
    reports = judge(shrinking(0.02), decay=0.02)
    assert severities(reports) == [[], [], [], ["warn"], ["warn"], ["warn"], ["fail"], ["fail"]]
    (alarm,) = reports[6]
    assert alarm.layer is None
    assert alarm.evidence.startswith("Weight decay too large: the weights (5 of 5 parameter groups)")
    # 0.98^50 = 0.364 since step 10
    assert numbers_in(alarm.evidence) == [5, 5, 2.75, 10, 2, 2]


def test_fall_that_decay_does_not_explain_needs_three_fold() -> None:
    assert severities(judge(shrinking(0.02), decay=0.006)) == [[]] * 8
    reports = judge(shrinking(0.03), decay=0.006)
    assert [bool(alarms) for alarms in reports] == [False] * 4 + [True] * 4
    assert "decay is not the cause" in reports[-1][0].remedy
    assert judge(shrinking(0.03))[-1][0].evidence.startswith("Weights shrink: ")


def test_shares_of_ordinary_decay_raise_no_alarm() -> None:
    assert severities(judge(shrinking(0.007), decay=0.007)) == [[]] * 8, "1.4-fold in 49 steps"
    assert severities(judge(shrinking(0.02)[::-1], decay=0.02)) == [[]] * 8, "growing"


def test_single_group_is_reported_by_name() -> None:
    reports = judge(shrinking(0.02, groups=[2]), decay=0.02)
    assert {alarm.layer for alarms in reports for alarm in alarms} == {"blocks.2"}
    assert {alarm.layer for alarm in judge(shrinking(0.02, groups=[0, 1, 2]), decay=0.02)[-1]} == {None}
    assert [alarm.layer for alarm in judge(shrinking(0.02, groups=[0, 1]), decay=0.02)[-1]] == ["blocks.0", "blocks.1"]


def test_rise_within_the_window_ends_the_report() -> None:
    weights = shrinking(0.02)
    weights[6] = [0.1] * GROUPS
    assert judge(weights, decay=0.02)[-1] == []


def test_gains_that_vanish_are_reported_with_the_remedy_for_gains() -> None:
    rule, history = WeightsVanish(), History(facts=facts())
    for count in range(4):
        gain = 0.95 ** (10 * count)
        signals = {"gain_max": [2 * gain] * 4, "gain_ratio": [2.0] * 4}
        history.samples.append(Sample(max(10 * count, 1), signals, gain_decay=[0.05] * 4))
        reports = list(rule.on_sample(history, history.samples[-1]))
    (alarm,) = reports
    assert alarm.evidence.startswith("Weight decay too large: the gains (4 of 4 norms)")
    assert "weight_decay=0" in alarm.remedy


def test_outlier_gain_does_not_hide_or_imitate_shrinking_gains() -> None:
    """The median gain counts: the largest one falls, the others stay."""
    rule, history = WeightsVanish(), History(facts=facts())
    for count in range(6):
        outlier = 10.0 * 0.95 ** (10 * count)
        signals = {"gain_max": [outlier] * 4, "gain_ratio": [outlier] * 4}
        history.samples.append(Sample(max(10 * count, 1), signals, gain_decay=[0.05] * 4))
        assert list(rule.on_sample(history, history.samples[-1])) == []


def test_weights_of_zero_fail_at_the_second_sample_four_steps_later() -> None:
    zero = [[0.1, 0.1, 0.0, 0.1, 0.1]] * 3
    reports = judge(zero)
    assert severities(reports) == [[], ["fail"], ["fail"]]
    assert reports[1][0].layer == "blocks.2"
    assert reports[1][0].evidence == "Weights set to 0: most matrices of blocks.2 are 0."
    assert severities(judge(zero, every=3)) == [[], [], ["fail"]], "steps 1, 3 and 6"
    assert severities(judge([zero[0], [0.1] * GROUPS])) == [[], []], "initialized to 0 on purpose"


def test_weights_that_were_zero_before_each_step_are_reset() -> None:
    reports = judge([[0.1] * GROUPS] * 2, ratio=1e20)
    assert severities(reports)[-1] == ["fail"] * GROUPS
    assert "were 0 before the step" in reports[-1][0].evidence


def test_vanishing_weights_explain_their_consequences() -> None:
    assert {"adam-eps", "branch-silent", "gain-drift", "depth-growth", "loss-rising"} <= set(WeightsVanish.explains)


# Real runs ------------------------------------------------------------------------------------------------------------


def decayed(model: TinyGPT, decay: float, chosen: Callable[[str, Tensor], bool]) -> torch.optim.Optimizer:
    of_name = dict(model.named_parameters())
    groups = [{"params": [p for name, p in of_name.items() if chosen(name, p)], "weight_decay": decay}]
    groups += [{"params": [p for name, p in of_name.items() if not chosen(name, p)], "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


@pytest.mark.parametrize(
    ("decay", "chosen", "layer", "words"),
    [
        (20.0, lambda name, p: p.ndim == 2, None, "the weights"),
        (20.0, lambda name, p: p.ndim == 2 and name.startswith("h.2."), "h.2", "the weights"),
        (50.0, lambda name, p: p.ndim == 1, None, "the gains"),
    ],
    ids=["all matrices", "one block", "gains"],
)
def test_weight_decay_that_dominates_is_reported(
    decay: float, chosen: Callable[[str, Tensor], bool], layer: str | None, words: str
) -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    watched, _ = train_tiny(model, decayed(model, decay, chosen), steps=55)
    (alarm,) = [alarm for alarm in watched.alarms if alarm.severity == "fail"]
    assert (alarm.rule, alarm.layer) == ("weights-vanish", layer)
    assert alarm.evidence.startswith(f"Weight decay too large: {words}")


@pytest.mark.parametrize("decay", [0.1, 2.0])
def test_harmless_weight_decay_raises_no_alarm(decay: float) -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    watched, losses = train_tiny(model, decayed(model, decay, lambda name, p: True), steps=60)
    assert losses[-1] < 0.65 * losses[0]
    assert named(watched.alarms) == []


def test_block_that_is_zeroed_before_each_step_is_named() -> None:
    @torch.no_grad()
    def zero(model: TinyGPT, optimizers: object, step: int) -> None:
        for parameter in model.h[2].parameters():
            parameter.zero_()

    torch.manual_seed(0)
    watched, _ = train_tiny(TinyGPT(), steps=30, before=zero)
    assert named(watched.alarms)[0] == ("fail", "weights-vanish", "h.2")
    assert [alarm.severity for alarm in of_rule(watched, "gain-drift")] in ([], ["warn"], ["warn", "warn"])
