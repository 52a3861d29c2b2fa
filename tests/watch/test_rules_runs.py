"""Rules about a run as a whole: rates that jump, steps that are skipped, losses that do not fall, weights that vanish."""

from __future__ import annotations

import math

import pytest
from histories import facts, first, give_samples, give_steps, layers, noise, rates

from omninorm.watch import Alarm, History, NonFinite, Sample, Step
from omninorm.watch.judge import Judge
from omninorm.watch.rules import Rule
from omninorm.watch.rules.adam_eps import AdamEps
from omninorm.watch.rules.attention_logits import AttentionLogits
from omninorm.watch.rules.dead_units import DeadUnits
from omninorm.watch.rules.eps_share import EpsShare
from omninorm.watch.rules.layer_jump import LayerJump
from omninorm.watch.rules.learning_rate import LearningRate
from omninorm.watch.rules.loss_spike import LossSpike
from omninorm.watch.rules.no_progress import NoProgress
from omninorm.watch.rules.weights_vanish import WeightsVanish

pytestmark = pytest.mark.usefixtures("words")


def give(rule: Rule, losses: list[float], lrs: list[float], history: History | None = None) -> list[Alarm]:
    """All that the rule reports about steps with these losses and rates."""
    history = history or History(facts=facts())
    found = []
    for number, (loss, lr) in enumerate(zip(losses, lrs, strict=True), start=1):
        history.steps.append(Step(number, loss, 1.0, lr))
        found += rule.on_step(history, history.steps[-1])
    return found


# A spike's cause --------------------------------------------------------------------------------------------------------


def test_a_loss_spike_after_a_jump_of_the_rate_is_the_rates() -> None:
    alarm = give(LossSpike(), [*noise(40), 6.0], [*[0.002] * 39, 0.1, 0.1])[0]
    assert alarm.evidence.startswith("Learning rate jumped 50-fold: ")
    assert "from 0.002 to 0.1 by step 40" in alarm.evidence
    assert "over the last 40 steps" in alarm.evidence
    assert "batch" not in alarm.remedy
    for lrs in ([*[0.002] * 39, 0.0039, 0.0039], [*[0.002] * 33, *[0.1] * 8], [math.nan] * 41, [0.0] * 41):
        assert "Look at the batch of step 41" in give(LossSpike(), [*noise(40), 6.0], lrs)[0].remedy


def test_a_loss_spike_after_large_updates_is_theirs() -> None:
    for step, ratio, told in ((40, 0.67, True), (40, 0.04, False), (19, 0.67, False), (1, 0.67, False)):
        history = History(facts=facts())
        history.samples.append(Sample(step, {"update_ratio": [ratio] * 5}))
        alarm = give(LossSpike(), [*noise(40), 6.0], [1e-3] * 41, history)[0]
        assert ("67 %" in alarm.evidence) is told
        assert ("batch" in alarm.remedy) is not told


def test_a_rate_too_high_explains_spikes_and_dead_units() -> None:
    assert {"loss-spike", "gradient-spike", "dead-units"} <= set(LearningRate.explains)


# Skipped steps ----------------------------------------------------------------------------------------------------------


def judged(losses: list[float], found: NonFinite, norms: list[float] | None = None) -> list[tuple[int, str]]:
    """Step and rule of the alarms about a run with a NaN, and the weights of a layer × 50 from step 300 on."""
    history, judge, alarms = History(facts=facts()), Judge(), []
    for number, loss in enumerate(losses, start=1):
        history.nonfinite = found if number >= found.step else None
        history.steps.append(Step(number, loss, norms[number - 1] if norms else 1.0, 1e-3))
        alarms += judge.judge_steps(history, [history.steps[-1]])
        if number % 10 == 0:
            jump = {"weight_rms": layers(0.1, 5.0 if number >= 300 else 0.1, count=5)}
            history.samples.append(Sample(number, jump))
            alarms += judge.judge_sample(history)
    return [(alarm.step, alarm.rule) for alarm in alarms]


FALLING = [3.0 + 3.0 * 0.99**step for step in range(320)]
SKIPPED = NonFinite(5, "backward", "blocks.1.w", "nan")


def test_after_a_skipped_step_all_is_judged_again() -> None:
    losses = [*FALLING[:4], math.nan, *FALLING[5:]]
    assert judged(losses, SKIPPED) == [(5, "nonfinite"), (300, "layer-jump")]
    assert judged(FALLING, SKIPPED, [*[1.0] * 4, math.inf, *[1.0] * 315]) == [(5, "nonfinite"), (300, "layer-jump")]


def test_while_everything_is_nan_nothing_more_is_said() -> None:
    lost = [*FALLING[:4], *[math.nan] * 316]
    assert judged(lost, SKIPPED) == [(5, "nonfinite")]
    assert judged(FALLING, SKIPPED, [*[1.0] * 4, *[math.nan] * 316]) == [(5, "nonfinite")], "no step is ever taken"
    two = [*FALLING[:4], *[math.nan, 3.0, 3.0] * 105, math.nan]
    assert judged(two, SKIPPED) == [(5, "nonfinite")], "never three in a row"


def test_a_relapse_is_told() -> None:
    losses = [*FALLING[:4], math.nan, *FALLING[5:200], *[math.nan] * 120]
    assert judged(losses, SKIPPED) == [(5, "nonfinite"), (203, "nonfinite")]
    once = [*FALLING[:4], math.nan, *FALLING[5:200], math.nan, *FALLING[201:299]]
    assert judged(once, SKIPPED) == [(5, "nonfinite")]


# No progress ------------------------------------------------------------------------------------------------------------


def told(alarms: list[Alarm]) -> str | None:
    """The first alarm's cause."""
    return alarms[0].evidence.split(":")[0] if alarms else None


@pytest.mark.parametrize(
    ("losses", "rate", "update", "expected"),
    [
        (noise(80), 1e-3, None, "The loss has not fallen"),
        (noise(80), 0.0, None, "Learning rate 0, no weight changes"),
        (noise(80), 1e-9, 1e-8, "Updates change only 1e-08 of the weights"),
        (noise(80), math.nan, 1e-5, "The loss has not fallen"),
        (noise(80, 3.0, 0.3), 0.0, None, "Learning rate 0, no weight changes"),
        ([*noise(40, 3.0, 0.3), *noise(40, 2.9, 0.3)], 0.0, None, "Learning rate 0, no weight changes"),
        (noise(59), 0.0, None, None),
        ([*noise(40), *noise(40, 2.9, 0.01)], 1e-3, 1e-3, None),
        ([3.0 * 0.999**step for step in range(80)], 1e-3, 1e-3, None),
        ([*noise(40, 3.0), *noise(20, 2.0), *noise(40, 3.0)], 1e-3, 1e-3, None),
        ([*noise(40, 3.0, 0.01), *noise(40, 4.0, 0.01)], 1e-3, 1e-3, None),
    ],
    ids=[
        "flat",
        "rate 0",
        "tiny",
        "rate unknown",
        "noisy",
        "noisy, 3 % lower",
        "59 steps",
        "3 %",
        "slow",
        "there and back",
        "risen",
    ],
)
def test_no_progress(losses: list[float], rate: float, update: float | None, expected: str | None) -> None:
    history = History(facts=facts())
    if update is not None:
        history.samples.extend(Sample(step, {"update_ratio": [update] * 5}) for step in (10, 20))
    alarms = give(NoProgress(), losses, [rate] * len(losses), history)
    assert told(alarms) == expected
    assert {alarm.severity for alarm in alarms} <= {"warn"}
    if alarms:
        assert alarms[0].step == 60
        assert alarms[0].remedy.startswith("Is that meant")


def test_no_progress_waits_for_a_warm_up_and_spares_a_resumed_run() -> None:
    assert give(NoProgress(), noise(80), [1e-6 * step for step in range(80)]) == []
    history, rule = History(facts=facts()), NoProgress()
    for number, loss in enumerate(noise(80), start=1001):
        history.steps.append(Step(number, loss, 1.0, 1e-3))
        assert list(rule.on_step(history, history.steps[-1])) == []


# Weights ----------------------------------------------------------------------------------------------------------------


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


# A layer's jump ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("after", "severity"), [(2.9, "warn"), (3.14, "warn"), (3.16, "fail"), (math.nan, "warn")])
def test_activations_that_jump_are_one_alarm_for_a_layer(after: float, severity: str) -> None:
    before = {"branch_ratio": layers(0.3), "feed_forward_ratio": layers(0.2), "weight_rms": layers(0.1, count=5)}
    jumped = {**before, "branch_ratio": layers(0.3, 20.1), "feed_forward_ratio": layers(0.2, 26.4)}
    history = History(facts=facts())
    history.steps.extend(Step(step, 3.0 if step < 35 else after, 1.0, 1e-3) for step in range(1, 51))
    reports = give_samples(LayerJump(), [*[before] * 4, jumped, jumped], history)
    assert [(alarm.severity, alarm.layer) for alarm in reports[-1]] == [(severity, "blocks.2")]
    assert reports[-1][0].evidence.startswith("Activations jumped at blocks.2: the share that the feed-forward adds")


def test_activations_that_jump_after_large_updates_are_the_rates() -> None:
    for ratio, severity in ((0.049, "fail"), (0.17, "warn")):
        before = {"branch_ratio": layers(0.3), "update_ratio": [ratio] * 5}
        jumped = {**before, "branch_ratio": layers(0.3, 20.1)}
        history = History(facts=facts())
        history.steps.extend(Step(step, 3.0 if step < 35 else 4.0, 1.0, 1e-3) for step in range(1, 51))
        (alarm,) = give_samples(LayerJump(), [*[before] * 4, jumped, jumped], history)[-1]
        assert alarm.severity == severity
        assert ("learning rate, and warm up" in alarm.remedy) is (severity == "warn")


# Words ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "signal", "values", "cause"),
    [
        (AdamEps(), "adam_eps_ratio", [0.5] * 5, "Adam's ε too large"),
        (AttentionLogits(), "attention_logit", [2e4] * 4, "Attention logits too large"),
        (EpsShare(), "eps_share", [0.6] * 4, "Norm's ε too large"),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_evidence_begins_with_the_cause(rule: Rule, signal: str, values: list[float], cause: str) -> None:
    assert give_samples(rule, [{signal: values}] * 5)[-1][0].evidence.split(":")[0] == cause


def test_dead_units_do_not_presume_an_activation() -> None:
    remedy = give_samples(DeadUnits(), [{"dead_units": layers(0.0, 0.5)}] * 5)[-1][0].remedy
    assert "if the activation is a ReLU" in remedy


def test_a_short_history_is_called_short() -> None:
    assert "over the last 30 steps" in give_steps(LossSpike(), [*noise(30), 6.0])[0].evidence
