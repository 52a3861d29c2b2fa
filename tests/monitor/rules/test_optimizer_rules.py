"""adam-eps on synthetic histories."""

from __future__ import annotations

import pytest
from helpers.histories import Signals, facts, first, give_samples, last, layers

from omninorm.monitor import History, Sample
from omninorm.monitor.rules.adam_eps import AdamEps

pytestmark = pytest.mark.usefixtures("words")

# Adam's ε -------------------------------------------------------------------------------------------------------------


def test_adam_eps_names_the_tensor() -> None:
    one = {"adam_eps_ratio": layers(1e4, 0.5, count=5)}
    reports = give_samples(AdamEps(), [one] * 12)
    assert first(reports) == 11, "100 steps after the first"
    assert [(alarm.severity, alarm.layer) for alarm in reports[-1]] == [("warn", "blocks.2.w")]
    most = {"adam_eps_ratio": [0.5, 0.6, 0.7, 1e4, 1e4]}
    reports = give_samples(AdamEps(), [most] * 4)
    assert first(reports) == 2
    assert reports[2][0].severity == "fail"
    assert give_samples(AdamEps(), [{"adam_eps_ratio": layers(10.1, count=5)}] * 15)[-1] == []


def test_usual_eps_above_the_gradients_asks_for_the_reason_of_their_size_first() -> None:
    for eps, ratio, begin in ((1e-8, 0.5, "Find out first"), (1.1e-8, 0.5, "Set ε"), (1e-3, 0.9e-3, "Find out first")):
        history = History(facts=facts(adam_eps=eps))
        (alarm,) = give_samples(AdamEps(), [{"adam_eps_ratio": [ratio] * 5}] * 4, history)[-1]
        assert alarm.remedy.startswith(begin)


def test_adam_eps_keeps_naming_the_same_tensor() -> None:
    samples = [{"adam_eps_ratio": layers(1e4, 0.5, at=count % 5, count=5)} for count in range(15)]
    named = [alarm.layer for alarms in give_samples(AdamEps(), samples) for alarm in alarms]
    assert len(named) > 3
    assert len(set(named)) == 1


def test_adam_eps_ignores_zero_gradients_and_biases() -> None:
    assert first(give_samples(AdamEps(), [{"adam_eps_ratio": layers(1e4, 0.0, count=5)}] * 15)) is None
    history = History(facts=facts())
    for step in range(10, 200, 10):
        worst = {"adam_eps_ratio": [f"{group}.key.bias" for group in history.facts.groups]}
        history.samples.append(Sample(step, {"adam_eps_ratio": [1e-3] * 5}, worst))
        assert list(AdamEps().on_sample(history, history.samples[-1])) == []


def test_adam_eps_fails_if_half_of_the_groups_are_affected_for_ten_steps() -> None:
    history = History(facts=facts(groups=("a", "b", "c", "d")))
    assert last(AdamEps(), [{"adam_eps_ratio": [0.5, 0.9, 1.0, 1e4]}] * 4, history) == [("fail", "a.w")]
    history = History(facts=facts(groups=("a", "b", "c", "d")))
    assert last(AdamEps(), [{"adam_eps_ratio": [0.5, 1.0, 1.0, 1e4]}] * 4, history) == []
    every_step, rule = History(facts=facts(every=1)), AdamEps()
    for step in range(1, 12):
        every_step.samples.append(Sample(step, {"adam_eps_ratio": [0.5] * 5}))
        assert bool(list(rule.on_sample(every_step, every_step.samples[-1]))) is (step == 11), "over 10 steps"


def test_adam_eps_names_another_tensor_after_a_clear_sample() -> None:
    faulty, healthy = [{"adam_eps_ratio": [0.5] * 5}] * 4, [{"adam_eps_ratio": [1e4] * 5}]
    other: list[Signals] = [{"adam_eps_ratio": [0.9, 0.8, 0.5, 0.9, 0.9]}] * 4
    reports = give_samples(AdamEps(), [*faulty, *healthy, *other])
    assert [alarms[0].layer for alarms in reports if alarms] == ["blocks.0.w", "blocks.0.w", "blocks.2.w", "blocks.2.w"]
