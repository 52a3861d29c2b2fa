"""Rules about the optimizer: Adam's ε, learning rates that are too high, weights that vanish."""

from __future__ import annotations

import pytest
from helpers.histories import Signals, facts, first, give_samples, give_steps, last, layers, rates

from omninorm.watch import History, Sample
from omninorm.watch.rules.adam_eps import AdamEps
from omninorm.watch.rules.learning_rate import LearningRate
from omninorm.watch.rules.weights_vanish import WeightsVanish

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


def test_adam_eps_keeps_to_the_tensor_it_named() -> None:
    samples = [{"adam_eps_ratio": layers(1e4, 0.5, at=count % 5, count=5)} for count in range(15)]
    named = [alarm.layer for alarms in give_samples(AdamEps(), samples) for alarm in alarms]
    assert len(named) > 3
    assert len(set(named)) == 1


def test_adam_eps_spares_zeros_and_biases() -> None:
    assert first(give_samples(AdamEps(), [{"adam_eps_ratio": layers(1e4, 0.0, count=5)}] * 15)) is None
    history = History(facts=facts())
    for step in range(10, 200, 10):
        worst = {"adam_eps_ratio": [f"{group}.key.bias" for group in history.facts.groups]}
        history.samples.append(Sample(step, {"adam_eps_ratio": [1e-3] * 5}, worst))
        assert list(AdamEps().on_sample(history, history.samples[-1])) == []


def test_half_of_the_groups_make_adams_eps_a_failure() -> None:
    history = History(facts=facts(groups=("a", "b", "c", "d")))
    assert last(AdamEps(), [{"adam_eps_ratio": [0.5, 0.9, 1.0, 1e4]}] * 4, history) == [("fail", "a.w")]
    history = History(facts=facts(groups=("a", "b", "c", "d")))
    assert last(AdamEps(), [{"adam_eps_ratio": [0.5, 1.0, 1.0, 1e4]}] * 4, history) == []
    every_step, rule = History(facts=facts(every=1)), AdamEps()
    for step in range(1, 12):
        every_step.samples.append(Sample(step, {"adam_eps_ratio": [0.5] * 5}))
        assert bool(list(rule.on_sample(every_step, every_step.samples[-1]))) is (step == 11), "over 10 steps"


def test_when_all_is_clear_adams_eps_may_name_another_tensor() -> None:
    sick, well = [{"adam_eps_ratio": [0.5] * 5}] * 4, [{"adam_eps_ratio": [1e4] * 5}]
    other: list[Signals] = [{"adam_eps_ratio": [0.9, 0.8, 0.5, 0.9, 0.9]}] * 4
    reports = give_samples(AdamEps(), [*sick, *well, *other])
    assert [alarms[0].layer for alarms in reports if alarms] == ["blocks.0.w", "blocks.0.w", "blocks.2.w", "blocks.2.w"]


# Rates ----------------------------------------------------------------------------------------------------------------


def test_a_rate_too_high_doubles_the_weights_and_does_harm() -> None:
    grown = [rates(0.6, 0.1), rates(0.12, 0.15), rates(0.06, 0.19), rates(0.03, 0.21, 0.2), rates(0.03, 0.21, 0.2)]
    reports = give_samples(LearningRate(), grown)
    assert first(reports) == 3
    assert [(alarm.severity, alarm.layer) for alarm in reports[3]] == [("fail", None)]
    assert "12 % (step 10)" in reports[3][0].evidence
    assert reports[3][0].evidence.startswith("Learning rate about 12-fold too high: ")
    assert "about 12-fold" in reports[3][0].remedy
    harmless = [rates(ratio["update_ratio"][0], ratio["weight_rms"][0]) for ratio in grown]
    assert give_samples(LearningRate(), harmless)[3][0].severity == "warn"


def test_harm_is_a_loss_that_does_not_fall() -> None:
    for losses, severity in (([5.0] * 40, "fail"), ([5.0 * 0.98**step for step in range(40)], "warn")):
        history, rule = History(facts=facts()), LearningRate()
        assert give_steps(rule, losses, history=history) == []
        reports = give_samples(rule, [rates(0.6, 0.1), rates(0.12, 0.15), rates(0.06, 0.25)], history)
        assert [alarm.severity for alarm in reports[-1]] == [severity]


def test_harm_is_a_loss_above_its_start() -> None:
    history, rule = History(facts=facts()), LearningRate()
    rising = [5.0 + 0.1 * number for number in range(1, 20)]  # too few to tell whether it has stopped falling
    assert give_steps(rule, rising, history=history) == []
    reports = give_samples(rule, [rates(0.6, 0.1), rates(0.12, 0.25)], history)
    assert [alarm.severity for alarm in reports[-1]] == ["fail"]
    assert "is not below its start" in reports[-1][0].evidence


def test_a_rate_is_judged_by_the_quiet_groups() -> None:
    loud: list[Signals] = [
        {"update_ratio": [0.3] * 8 + [0.01] * 2, "weight_rms": [0.1 * 2**count] * 8 + [0.1] * 2} for count in range(9)
    ]
    history = History(facts=facts(groups=tuple(f"group {index}" for index in range(10))))
    assert first(give_samples(LearningRate(), loud, history)) is None


def test_an_embedding_that_stays_as_it_is_does_not_excuse_a_rate() -> None:
    """PyTorch's embeddings start with a deviation of 1; and what beside the blocks is loud does not blame it."""
    beside: list[Signals] = [
        {"update_ratio": [*[0.2] * 4, 0.01], "weight_rms": [*[0.1 * 1.5**count] * 4, 1.0]} for count in range(4)
    ]
    assert first(give_samples(LearningRate(), beside)) == 2
    loud: list[Signals] = [
        {"update_ratio": [*[0.01] * 4, 0.5], "weight_rms": [*[0.1] * 4, 2.0**count]} for count in range(9)
    ]
    assert first(give_samples(LearningRate(), loud)) is None
    frozen: list[Signals] = [
        {"update_ratio": [*[None] * 4, 0.5], "weight_rms": [*[0.1] * 4, 2.0**count]} for count in range(4)
    ]
    assert first(give_samples(LearningRate(), frozen)) == 1


def test_ordinary_rates_are_silent() -> None:
    assert first(give_samples(LearningRate(), [rates(0.3, 0.1), *[rates(0.03, 0.1)] * 20])) is None
    slow = [rates(0.03, 0.1 * 1.1**count) for count in range(30)]
    assert first(give_samples(LearningRate(), slow)) is None, "grown, but by small steps"
    assert first(give_samples(LearningRate(), [rates(0.06, 0.1)] * 8)) == 3


def test_a_lora_at_zero_does_not_make_a_rate_too_high() -> None:
    def signals(count: int) -> Signals:
        fresh = 1.0 / max(10 * count, 1)
        return {"update_ratio": [*[fresh] * 4, 1e-3], "weight_rms": [*[0.1 + 1e-4 * count] * 4, 0.1]}

    assert first(give_samples(LearningRate(), [signals(count) for count in range(10)])) is None


def test_a_rate_too_high_explains_spikes_and_dead_units() -> None:
    assert {"loss-spike", "gradient-spike", "dead-units"} <= set(LearningRate.explains)


def test_weights_that_double_within_50_steps() -> None:
    doubled = [rates(0.01, 0.1)] * 6
    for before, growth, told in ((0.1, 0.2, True), (0.1, 0.199, False)):
        samples = [rates(0.01, 1.0), rates(0.01, before), *doubled[2:], rates(0.06, growth)]
        reports = give_samples(LearningRate(), samples)
        assert bool(reports[-1]) is told
        assert first(reports) == (6 if told else None)
    assert "from step 10 on" in give_samples(LearningRate(), [*doubled, rates(0.06, 0.2)])[-1][0].evidence
    steady = [rates(0.03, 0.1 * 1.2**count) for count in range(12)]
    assert first(give_samples(LearningRate(), steady)) is None, "2.5-fold, by small steps"


@pytest.mark.parametrize(
    ("samples", "severity"), [([rates(0.06, 0.1)] * 5, "warn"), ([rates(0.6, 0.1), rates(0.12, 0.25)], "fail")]
)
def test_harm_needs_growth_and_a_stall_is_harm(samples: list[Signals], severity: str) -> None:
    history, rule = History(facts=facts()), LearningRate()
    assert give_steps(rule, [*[5.0] * 4, *[3.0] * 36], history=history) == []
    assert last(rule, samples, history) == [(severity, None)]


# Weights that vanish --------------------------------------------------------------------------------------------------


def test_weights_vanish() -> None:
    shrinking = [rates(0.12, 0.1 * 0.35**count) for count in range(6)]
    reports = give_samples(WeightsVanish(), shrinking)
    assert [[alarm.severity for alarm in alarms] for alarms in reports] == [
        [],
        [],
        ["warn"],
        ["warn"],
        ["fail"],
        ["fail"],
    ]
    assert reports[4][0].evidence.startswith("Weight decay too large: ")
    assert "by about 10 % a step" in reports[4][0].evidence
    assert "lr × weight_decay is about 0.1 per step" in reports[4][0].remedy


@pytest.mark.parametrize(
    ("ratio", "factor", "groups"), [(0.049, 0.35, 5), (0.12, 0.85, 5), (0.12, 3.0, 5), (0.12, 0.35, 2)]
)
def test_weights_that_do_not_vanish(ratio: float, factor: float, groups: int) -> None:
    def signals(count: int) -> dict[str, list[float]]:
        weights = [0.1 * factor**count if index < groups else 0.1 for index in range(5)]
        return {"update_ratio": [ratio] * 5, "weight_rms": weights}

    assert first(give_samples(WeightsVanish(), [signals(count) for count in range(6)])) is None


def test_vanishing_weights_explain_what_comes_of_them() -> None:
    assert {"adam-eps", "branch-silent", "gain-drift", "depth-growth"} <= set(WeightsVanish.explains)
