"""Rules about the optimizer: Adam's ε, learning rates that are too high, and vanishing weights."""

from __future__ import annotations

import pytest
from helpers.histories import Signals, facts, first, give_samples, give_steps, last, layers, numbers_in, rates

from omninorm.monitor import History, Sample
from omninorm.monitor.rules.adam_eps import AdamEps
from omninorm.monitor.rules.learning_rate import LearningRate
from omninorm.monitor.rules.weights_vanish import WeightsVanish

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


# Learning rates -------------------------------------------------------------------------------------------------------


def test_learning_rate_too_high_fails_if_weights_double_and_it_does_harm() -> None:
    grown = [rates(0.6, 0.1), rates(0.12, 0.15), rates(0.06, 0.19), rates(0.03, 0.21, 0.2), rates(0.03, 0.21, 0.2)]
    reports = give_samples(LearningRate(), grown)
    assert first(reports) == 3
    assert [(alarm.severity, alarm.layer) for alarm in reports[3]] == [("fail", None)]
    assert reports[3][0].evidence.startswith("Learning rate about ")
    # 12 times too high; step 10 changed weights by 12 %, 1 % is plenty; 2.1-fold since step 1; entropies.
    assert numbers_in(reports[3][0].evidence) == [12, 10, 12, 1, 2.1, 1, 0.2, 0.9]
    assert numbers_in(reports[3][0].remedy) == [12]
    harmless = [rates(ratio["update_ratio"][0], ratio["weight_rms"][0]) for ratio in grown]
    assert give_samples(LearningRate(), harmless)[3][0].severity == "warn"


def test_loss_that_does_not_fall_is_harm() -> None:
    for losses, severity in (([5.0] * 40, "fail"), ([5.0 * 0.98**step for step in range(40)], "warn")):
        history, rule = History(facts=facts()), LearningRate()
        assert give_steps(rule, losses, history=history) == []
        reports = give_samples(rule, [rates(0.6, 0.1), rates(0.12, 0.15), rates(0.06, 0.25)], history)
        assert [alarm.severity for alarm in reports[-1]] == [severity]


def test_loss_above_its_initial_value_is_harm() -> None:
    history, rule = History(facts=facts()), LearningRate()
    rising = [5.0 + 0.1 * number for number in range(1, 20)]  # too few to see whether it has stopped falling
    assert give_steps(rule, rising, history=history) == []
    reports = give_samples(rule, [rates(0.6, 0.1), rates(0.12, 0.25)], history)
    assert [alarm.severity for alarm in reports[-1]] == ["fail"]
    # Means of the last 5 and the first 4 losses: 5 + 0.1 · (15 + … + 19)/5 and 5 + 0.1 · (1 + … + 4)/4.
    assert numbers_in(reports[-1][0].evidence)[-2:] == [6.7, 5.25]


def test_learning_rate_is_judged_by_the_quiet_groups() -> None:
    loud: list[Signals] = [
        {"update_ratio": [0.3] * 8 + [0.01] * 2, "weight_rms": [0.1 * 2**count] * 8 + [0.1] * 2} for count in range(9)
    ]
    history = History(facts=facts(groups=tuple(f"group {index}" for index in range(10))))
    assert first(give_samples(LearningRate(), loud, history)) is None


def test_learning_rate_is_judged_by_the_blocks_not_by_the_embedding() -> None:
    """PyTorch initializes embeddings with std 1, so they hardly change at any learning rate."""
    outside: list[Signals] = [
        {"update_ratio": [*[0.2] * 4, 0.01], "weight_rms": [*[0.1 * 1.5**count] * 4, 1.0]} for count in range(4)
    ]
    assert first(give_samples(LearningRate(), outside)) == 2
    loud: list[Signals] = [
        {"update_ratio": [*[0.01] * 4, 0.5], "weight_rms": [*[0.1] * 4, 2.0**count]} for count in range(9)
    ]
    assert first(give_samples(LearningRate(), loud)) is None
    frozen: list[Signals] = [
        {"update_ratio": [*[None] * 4, 0.5], "weight_rms": [*[0.1] * 4, 2.0**count]} for count in range(4)
    ]
    assert first(give_samples(LearningRate(), frozen)) == 1


def test_ordinary_learning_rates_raise_no_alarm() -> None:
    assert first(give_samples(LearningRate(), [rates(0.3, 0.1), *[rates(0.03, 0.1)] * 20])) is None
    slow = [rates(0.03, 0.1 * 1.1**count) for count in range(30)]
    assert first(give_samples(LearningRate(), slow)) is None, "the weights grew, but by small updates"
    assert first(give_samples(LearningRate(), [rates(0.06, 0.1)] * 8)) == 3


def test_lora_initialized_to_zero_raises_no_learning_rate_alarm() -> None:
    def signals(count: int) -> Signals:
        fresh = 1.0 / max(10 * count, 1)
        return {"update_ratio": [*[fresh] * 4, 1e-3], "weight_rms": [*[0.1 + 1e-4 * count] * 4, 0.1]}

    assert first(give_samples(LearningRate(), [signals(count) for count in range(10)])) is None


def test_learning_rate_explains_spikes_and_dead_units() -> None:
    assert {"loss-spike", "gradient-spike", "dead-units"} <= set(LearningRate.explains)


def test_weights_must_double_within_50_steps() -> None:
    doubled = [rates(0.01, 0.1)] * 6
    for before, growth, expected in ((0.1, 0.2, True), (0.1, 0.199, False)):
        samples = [rates(0.01, 1.0), rates(0.01, before), *doubled[2:], rates(0.06, growth)]
        reports = give_samples(LearningRate(), samples)
        assert bool(reports[-1]) is expected
        assert first(reports) == (6 if expected else None)
    (alarm,) = give_samples(LearningRate(), [*doubled, rates(0.06, 0.2)])[-1]
    assert numbers_in(alarm.evidence)[-2:] == [2, 10], "2-fold since step 10"
    steady = [rates(0.03, 0.1 * 1.2**count) for count in range(12)]
    assert first(give_samples(LearningRate(), steady)) is None, "2.5-fold, but by small updates"


@pytest.mark.parametrize(
    ("samples", "severity"), [([rates(0.06, 0.1)] * 5, "warn"), ([rates(0.6, 0.1), rates(0.12, 0.25)], "fail")]
)
def test_stalled_loss_is_harm_only_if_the_weights_doubled(samples: list[Signals], severity: str) -> None:
    history, rule = History(facts=facts()), LearningRate()
    assert give_steps(rule, [*[5.0] * 4, *[3.0] * 36], history=history) == []
    assert last(rule, samples, history) == [(severity, None)]


# Weights that vanish --------------------------------------------------------------------------------------------------


def test_weights_that_shrink_three_fold_warn_then_fail() -> None:
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
    # Since step 1 the weights fell by 0.35⁴ in 39 steps: 1 − 0.35^(4/39) = 0.10 per step.
    assert numbers_in(reports[4][0].evidence) == [66.6, 1, 10]
    assert numbers_in(reports[4][0].remedy) == [0.1, 1e-3]


@pytest.mark.parametrize(
    ("ratio", "factor", "groups"), [(0.049, 0.35, 5), (0.12, 0.85, 5), (0.12, 3.0, 5), (0.12, 0.35, 2)]
)
def test_weights_that_shrink_less_raise_no_alarm(ratio: float, factor: float, groups: int) -> None:
    def signals(count: int) -> dict[str, list[float]]:
        weights = [0.1 * factor**count if index < groups else 0.1 for index in range(5)]
        return {"update_ratio": [ratio] * 5, "weight_rms": weights}

    assert first(give_samples(WeightsVanish(), [signals(count) for count in range(6)])) is None


def test_vanishing_weights_explain_their_consequences() -> None:
    assert {"adam-eps", "branch-silent", "gain-drift", "depth-growth"} <= set(WeightsVanish.explains)
