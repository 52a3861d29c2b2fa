"""router-collapse and dead-experts, on synthetic loads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers.histories import facts, numbers_in

from omninorm.monitor import Alarm, History, Sample
from omninorm.monitor.history import Load
from omninorm.monitor.rules import Rule
from omninorm.monitor.rules.dead_experts import DeadExperts
from omninorm.monitor.rules.expert_load import load_signals
from omninorm.monitor.rules.router_collapse import RouterCollapse

pytestmark = pytest.mark.usefixtures("words")

ROUTERS = tuple(f"blocks.{index}.gate" for index in range(4))
BALANCED = (0.5, 0.5, 0.5, 0.5)


def give_loads(rule: Rule, loads: Sequence[Sequence[float]], tokens: int = 100, choices: int = 2) -> list[list[Alarm]]:
    """Return what the rule reports at each sample, 10 steps apart, with these loads in block 2."""
    history, reports = History(facts=facts(routers=ROUTERS)), []
    for count, shares in enumerate(loads):
        load = Load(tuple(shares), tokens, choices)
        history.samples.append(Sample(max(10 * count, 1), {}, loads=[None, None, load, None]))
        reports.append(list(rule.on_sample(history, history.samples[-1])))
    return reports


def severities(reports: list[list[Alarm]]) -> str:
    """Return one letter for each sample: w(arn), f(ail) or a dash."""
    return "".join(alarms[0].severity[0] if alarms else "-" for alarms in reports)


def test_collapsed_router_warns_after_30_steps_and_fails_after_100() -> None:
    reports = give_loads(RouterCollapse(), [BALANCED, *[(1.0, 0.0, 1.0, 0.0)] * 12])
    assert severities(reports) == "----" + "w" * 7 + "ff"
    assert {alarm.layer for alarms in reports for alarm in alarms} == {"blocks.2.gate"}


@pytest.mark.parametrize(("share", "expected"), [(0.04, "w"), (0.06, "-")])
def test_collapse_begins_at_95_percent(share: float, expected: str) -> None:
    # Two of four experts get 1 − share of the choices.
    assert severities(give_loads(RouterCollapse(), [(1 - share, share, 1 - share, share)] * 12))[-1] == expected


@pytest.mark.parametrize(
    ("shares", "choices", "most", "least"),
    [
        (BALANCED, 2, 0.5, 1.0),
        ((1.0, 0.0, 1.0, 0.0), 2, 1.0, 0.0),
        ((0.2, 0.5, 0.2, 0.1), 1, 0.5, 0.4),
        ((0.8, 0.6, 0.4, 0.2), 2, 0.7, 0.4),
    ],
)
def test_signals_of_a_load(shares: Sequence[float], choices: int, most: float, least: float) -> None:
    found = load_signals([None, Load(tuple(shares), 100, choices)])
    assert found == {
        "expert_load": [None, pytest.approx(most)],
        "expert_least": [None, pytest.approx(least)],
    }


def test_models_without_experts_have_no_signals_of_a_load() -> None:
    assert load_signals([]) == load_signals([None, None]) == {}


def test_router_that_chooses_other_experts_each_time_has_not_collapsed() -> None:
    loads = [(1.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 1.0)] * 8
    assert severities(give_loads(RouterCollapse(), loads)) == "-" * 16
    assert severities(give_loads(DeadExperts(), loads)) == "-" * 16


@pytest.mark.parametrize(("shares", "tokens", "choices"), [((1.0, 1.0, 0.0), 100, 2), ((1.0, 0.0, 0.0, 0.0), 15, 1)])
def test_collapse_is_not_judged_with_few_experts_or_tokens(shares: Sequence[float], tokens: int, choices: int) -> None:
    assert severities(give_loads(RouterCollapse(), [shares] * 8, tokens, choices)) == "-" * 8


def test_numbers_of_a_collapse() -> None:
    reports = give_loads(RouterCollapse(), [(0.6, 0.4, 0.6, 0.4), *[(1.0, 0.02, 0.98, 0.0)] * 4])
    # 99 % of the choices are experts 0 and 2 of 4; a balanced expert gets 50 % of the tokens; 60 % at step 1.
    assert numbers_in(reports[-1][0].evidence) == pytest.approx([99, 0, 2, 4, 50, 1, 60])


def test_dead_expert_is_named_with_the_tokens_that_it_should_have_had() -> None:
    reports = give_loads(DeadExperts(), [BALANCED, *[(0.7, 0.7, 0.0, 0.6)] * 4], tokens=30)
    assert severities(reports) == "----w"
    (alarm,) = reports[-1]
    assert (alarm.severity, alarm.layer) == ("warn", "blocks.2.gate")
    # 4 samples of 30 tokens, of which each expert should get half.
    assert alarm.evidence.startswith("Expert 2 of the 4")
    assert numbers_in(alarm.evidence) == [2, 4, 60]


def test_expert_is_not_dead_before_50_tokens_are_missing() -> None:
    loads = [(1.0, 0.0, 0.6, 0.4)] * 8
    assert severities(give_loads(DeadExperts(), loads, tokens=16)) == "------ww"
    assert severities(give_loads(DeadExperts(), loads, tokens=12)) == "--------"


def test_unequal_load_is_not_a_dead_expert() -> None:
    assert severities(give_loads(DeadExperts(), [(1.0, 0.02, 0.6, 0.38)] * 8)) == "-" * 8
    assert severities(give_loads(DeadExperts(), [(1.0, 0.004, 0.6, 0.396)] * 8)) == "----wwww"


def test_experts_of_a_collapsed_router_are_not_reported_again() -> None:
    assert severities(give_loads(DeadExperts(), [(1.0, 0.0, 1.0, 0.0)] * 8)) == "-" * 8
