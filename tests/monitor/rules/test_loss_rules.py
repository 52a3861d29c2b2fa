"""Rules about the loss: spikes, spikes that do not recover, no progress, NaNs; and the causes that alarms name."""

from __future__ import annotations

import math

import pytest
from helpers.histories import facts, give_steps, layers, noise, numbers_in

from omninorm.monitor import Alarm, History, NonFinite, Sample, Step
from omninorm.monitor.alarms import Judge
from omninorm.monitor.rules.gradient_spike import GradientSpike
from omninorm.monitor.rules.loss_spike import LossSpike
from omninorm.monitor.rules.no_progress import NoProgress
from omninorm.monitor.rules.nonfinite import NonFiniteRule
from omninorm.monitor.rules.unrecovered_spike import UnrecoveredSpike

pytestmark = pytest.mark.usefixtures("words")

# Spikes of the loss and their causes -----------------------------------------------------------------------------


def test_loss_spike_needs_six_sigma_and_20_percent() -> None:
    assert give_steps(LossSpike(), noise(500)) == []
    assert give_steps(LossSpike(), [*noise(200), 3.59, *noise(50)]) == []  # 12σ, but less than 20 %
    assert give_steps(LossSpike(), [*noise(200, spread=0.2), 4.0, *noise(50)]) == []  # 33 %, but 5σ
    alarms = give_steps(LossSpike(), [*noise(200), 4.0, *noise(50)])
    assert [(alarm.step, alarm.severity, alarm.layer) for alarm in alarms] == [(201, "warn", None)]
    assert numbers_in(alarms[0].evidence)[2] == 128, "the steps it is compared with"


def test_spike_does_not_hide_the_next_one() -> None:
    losses = [*noise(200), 30.0, *noise(5), 5.0, *noise(5)]
    assert [alarm.step for alarm in give_steps(LossSpike(), losses)] == [201, 207]


def test_falling_loss_does_not_hide_a_spike() -> None:
    losses = [2.5 + 3 * 0.95**count for count in range(60)]
    assert [alarm.step for alarm in give_steps(LossSpike(), [*losses, 6.0])] == [61]


def test_loss_spike_names_the_batch_unless_the_gradient_was_unusual_before() -> None:
    ordinary = noise(100, 1.0, 0.05)
    batch = give_steps(LossSpike(), [*noise(100), 6.0], [*ordinary, 9.0])[0]
    assert batch.evidence.startswith("Unusual batch")
    assert numbers_in(batch.remedy) == [1, 101]
    update = give_steps(LossSpike(), [*noise(100), 6.0], [*ordinary[:-1], 9.0, 9.0])[0]
    assert update.evidence.startswith("Harmful update")
    assert numbers_in(update.evidence)[-1] == 100, "the step of the unusual gradient"
    assert update.remedy.startswith("Clip gradients at norm 1.0")
    assert "β₂" in update.remedy
    sgd = History(facts=facts(adam_eps=None))
    assert "β₂" not in give_steps(LossSpike(), [*noise(100), 6.0], [*ordinary[:-1], 9.0, 9.0], history=sgd)[0].remedy


def test_loss_spike_after_a_jump_of_the_learning_rate_names_the_learning_rate() -> None:
    alarm = give_steps(LossSpike(), [*noise(40), 6.0], lrs=[*[0.002] * 39, 0.1, 0.1])[0]
    assert alarm.evidence.startswith("Learning rate jumped")
    fold, loss, _, before, _, lowest, highest, step = numbers_in(alarm.evidence)
    assert (fold, loss, before, lowest, highest, step) == (50, 6, 40, 0.002, 0.1, 40)
    assert "batch" not in alarm.remedy
    assert numbers_in(alarm.remedy) == [40]
    for lrs in ([*[0.002] * 39, 0.0039, 0.0039], [*[0.002] * 33, *[0.1] * 8], [math.nan] * 41, [0.0] * 41):
        remedy = give_steps(LossSpike(), [*noise(40), 6.0], lrs=lrs)[0].remedy
        assert "batch" in remedy
        assert numbers_in(remedy) == [1, 41]


def test_loss_spike_after_large_updates_names_the_updates() -> None:
    for step, ratio, expected in ((40, 0.67, True), (40, 0.04, False), (19, 0.67, False), (1, 0.67, False)):
        history = History(facts=facts())
        history.samples.append(Sample(step, {"update_ratio": [ratio] * 5}))
        alarm = give_steps(LossSpike(), [*noise(40), 6.0], history=history)[0]
        assert (numbers_in(alarm.evidence)[-3:] == [40, 67, 1]) is expected, "step, percent, the usual percent"
        assert ("batch" in alarm.remedy) is not expected


def test_short_history_and_loss_without_noise_are_reported_as_such() -> None:
    assert numbers_in(give_steps(LossSpike(), [*noise(30), 6.0])[0].evidence)[2] == 30
    (alarm,) = give_steps(LossSpike(), [*[3.0] * 20, 6.0])
    assert numbers_in(alarm.evidence) == [6, 100, 20, 3, 3], "loss, % above the mean, steps, mean, loss before"


def test_loss_that_rose_over_several_steps_names_the_update() -> None:
    alarm = give_steps(LossSpike(), [*noise(100), 3.5, 6.0])[0]
    assert alarm.evidence.startswith("Harmful update")
    assert "over several steps" in alarm.evidence


def test_unusual_gradient_is_the_cause_for_four_steps() -> None:
    for quiet, cause in ((4, "Harmful update"), (5, "Unusual batch")):
        norms = [*noise(90, 1.0), 9.0, *[1.0] * quiet]
        (alarm,) = give_steps(LossSpike(), [*noise(90 + quiet), 6.0], norms)
        assert alarm.evidence.startswith(cause)


def test_learning_rate_jump_of_two_fold_is_the_cause_for_six_steps() -> None:
    losses = [*noise(40), 6.0]
    for lrs in ([*[0.002] * 35, *[0.1] * 6], [*[0.002] * 39, 0.004, 0.004]):
        assert give_steps(LossSpike(), losses, lrs=lrs)[0].evidence.startswith("Learning rate jumped")
    from_zero = [*[0.0] * 39, 0.1, 0.1]
    assert give_steps(LossSpike(), losses, lrs=from_zero)[0].evidence.startswith("Unusual batch")


def test_large_update_is_the_cause_for_two_sampling_intervals() -> None:
    for step, cause in ((21, "Updates too large"), (20, "Unusual batch")):
        history = History(facts=facts())
        history.samples.append(Sample(step, {"update_ratio": [0.3] * 5}))
        assert give_steps(LossSpike(), [*noise(40), 6.0], history=history)[0].evidence.startswith(cause)


# Spikes of the gradient -----------------------------------------------------------------------------------------------


def test_gradient_spike_is_reported_if_it_recurs_within_64_steps() -> None:
    norms = noise(200, 1.0, 0.1)
    assert give_steps(GradientSpike(), [3.0] * 250, noise(250, 1.0, 0.1)) == []
    assert give_steps(GradientSpike(), [3.0] * 250, [*norms, 3.2, *norms[:30]]) == [], "one harmless spike"
    assert give_steps(GradientSpike(), [3.0] * 250, [*norms, 2.9, 2.9, *norms[:30]]) == []
    three = [*norms, 3.3, *norms[:20], 3.3, 3.3]
    assert give_steps(GradientSpike(), [3.0] * 250, [*three, *norms[:30]]) == [], "three harmless ones, as with SGD"
    alarms = give_steps(GradientSpike(), [3.0] * 250, [*three, *norms[:9], 3.4])
    assert [(alarm.step, alarm.severity) for alarm in alarms] == [(233, "warn")]
    assert "recur" in alarms[0].evidence
    step, norm, fold, before, mean, *previous = numbers_in(alarms[0].evidence)
    assert (step, norm, before, previous) == (233, 3.4, 128, [201, 222, 223])
    assert fold * mean == pytest.approx(norm, rel=0.02)
    assert "clipped" in alarms[0].remedy
    assert give_steps(GradientSpike(), [3.0] * 300, [*three, *norms[:42], 3.4]) == [], "too far apart"


def test_gradient_spike_is_reported_if_the_loss_rises_within_five_steps() -> None:
    norms, losses = noise(70, 1.0, 0.1), noise(70)
    alarms = give_steps(GradientSpike(), [*losses, 3.0, 3.0, 3.3], [*norms, 3.2, 1.0, 1.0])
    assert [alarm.step for alarm in alarms] == [73]
    assert "Harmful" in alarms[0].evidence
    step, norm, _, before, _, low, high = numbers_in(alarms[0].evidence)
    assert (step, norm, before, high) == (71, 3.2, 70, 3.3)
    assert low == pytest.approx(3.0, abs=0.02)
    assert give_steps(GradientSpike(), [*losses, *[3.0] * 6, 3.3], [*norms, 3.2, *[1.0] * 6]) == []
    assert give_steps(GradientSpike(), [*losses[:60], 3.0, 3.3], [*norms[:60], 3.2, 1.0]) == [], (
        "60 steps of history are too few"
    )


def test_gradient_spikes_need_64_steps_and_recur_within_64() -> None:
    for count, steps in ((64, [68]), (63, [])):
        alarms = give_steps(GradientSpike(), [3.0] * 70, [*noise(count, 1.0), 3.5, 3.5, 3.5, 3.5])
        assert [alarm.step for alarm in alarms] == steps
    norms = noise(200, 1.0, 0.1)
    spikes = [*norms, 3.4, 3.4, 3.4, *norms[:61], 3.4]
    assert [alarm.step for alarm in give_steps(GradientSpike(), [3.0] * 300, spikes)] == [265]


# Losses that stay up --------------------------------------------------------------------------------------------------


def test_high_loss_warns_after_4_steps_and_fails_after_64() -> None:
    def severities(high: int, level: float = 6.5) -> list[tuple[int, str]]:
        alarms = give_steps(UnrecoveredSpike(), [*noise(200), *[level] * high, *noise(50)])
        return [(alarm.step, alarm.severity) for alarm in alarms]

    assert severities(4) == []
    assert severities(5) == [(205, "warn")]
    assert severities(100, level=5.9) == []
    assert {severity for _, severity in severities(64)} == {"warn"}
    assert severities(65)[-1] == (265, "fail")
    alarm = give_steps(UnrecoveredSpike(), [*[3.0] * 20, *[9.0] * 5])[-1]
    assert numbers_in(alarm.evidence) == [5, 21, 9, 3, 3], "steps, first step, loss, factor, earlier mean"
    assert numbers_in(alarm.remedy) == [21]


def test_losing_half_of_the_progress_counts_as_high() -> None:
    learned = [5.6, 5.6, 5.6, 5.6, *noise(100, 2.5)]
    assert give_steps(UnrecoveredSpike(), [*learned, *[4.3] * 5])[0].step == 109
    assert give_steps(UnrecoveredSpike(), [*learned, *[3.9] * 5]) == []
    barely = [5.6, 5.6, 5.6, 5.6, *noise(100, 5.3)]
    assert give_steps(UnrecoveredSpike(), [*barely, *[5.5] * 20]) == []


def test_twice_the_mean_of_sixteen_losses_counts_as_high() -> None:
    for level in (3.0, 0.3):
        assert [alarm.step for alarm in give_steps(UnrecoveredSpike(), [*[level] * 16, *[2 * level] * 5])] == [21]
        assert give_steps(UnrecoveredSpike(), [*[level] * 15, *[2 * level] * 5]) == []


def test_losing_half_of_the_progress_counts_only_if_it_was_a_fifth_of_the_first_loss() -> None:
    assert [alarm.step for alarm in give_steps(UnrecoveredSpike(), [*[5.0] * 4, *[4.0] * 128, *[4.5] * 5])] == [137]
    assert give_steps(UnrecoveredSpike(), [*[5.0] * 4, *[4.125] * 128, *[4.75] * 5]) == []


# No progress ----------------------------------------------------------------------------------------------------------


def first_cause(alarms: list[Alarm]) -> str | None:
    """The first alarm's cause."""
    return alarms[0].evidence.split(":")[0] if alarms else None


@pytest.mark.parametrize(
    ("losses", "rate", "update", "expected"),
    [
        (noise(80), 1e-3, None, "The loss has not fallen"),
        (noise(80), 0.0, None, "Learning rate 0, no weight changes"),
        (noise(80), 1e-9, 1e-8, "Updates are only 1e-08 of the weights"),
        (noise(80), math.nan, 1e-3, "The loss has not fallen"),
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
        "learning rate 0",
        "tiny",
        "learning rate unknown",
        "noisy",
        "noisy, 3 % lower",
        "59 steps",
        "3 %",
        "slow",
        "there and back",
        "risen",
    ],
)
def test_flat_loss_is_reported_with_its_cause(
    losses: list[float], rate: float, update: float | None, expected: str | None
) -> None:
    history = History(facts=facts())
    if update is not None:
        history.samples.extend(Sample(step, {"update_ratio": [update] * 5}) for step in (10, 20))
    alarms = give_steps(NoProgress(), losses, lrs=[rate] * len(losses), history=history)
    assert first_cause(alarms) == expected
    assert {alarm.severity for alarm in alarms} <= {"warn"}
    if alarms:
        assert alarms[0].step == 60
        steps, before, now = numbers_in(alarms[0].evidence)[-3:]
        assert steps == 60
        assert before == pytest.approx(sum(losses[:5]) / 5, rel=1e-3)
        assert now == pytest.approx(sum(losses[40:60]) / 20, rel=1e-3)
        assert "fine-tuning" in alarms[0].remedy or "intended" in alarms[0].remedy


def test_flat_loss_is_not_reported_in_a_warm_up_or_a_resumed_run() -> None:
    assert give_steps(NoProgress(), noise(80), lrs=[1e-6 * step for step in range(80)]) == []
    assert give_steps(NoProgress(), noise(80), start=1001) == []


def flat_run(rates: list[float], samples: list[tuple[int, float]]) -> list[Alarm]:
    """The alarms about 60 flat steps with these newest learning rates and updates."""
    history = History(facts=facts())
    history.samples.extend(Sample(step, {"update_ratio": [ratio] * 5}) for step, ratio in samples)
    return give_steps(NoProgress(), noise(60), lrs=[*[1e-3] * (60 - len(rates)), *rates], history=history)


def test_warm_up_is_judged_by_the_first_and_last_of_twenty_learning_rates() -> None:
    assert len(flat_run([1e-3, 2e-3, *[1e-3] * 16, 2e-3, 1e-3], [])) == 1
    assert flat_run([1e-3, 3e-3, *[1e-3] * 17, 2e-3], []) == []
    assert len(flat_run([math.nan] * 19 + [1e-3], [])) == 1


def test_tiny_updates_are_the_cause_if_two_samples_after_the_first_show_them() -> None:
    def cause(*samples: tuple[int, float]) -> str | None:
        return first_cause(flat_run([], list(samples)))

    tiny = "Updates are only 1e-07 of the weights"
    assert cause((40, 1e-7), (50, 1e-7), (60, 1e-7)) == tiny
    assert cause((2, 1e-7), (60, 1e-8)) == tiny
    small = "Updates are only 1e-06 of the weights per step (1e-3 to 1e-2 is usual)"
    assert cause((40, 1e-7), (50, 1e-6)) == small
    assert cause((40, 1e-7), (50, 2e-4)) == "The loss has not fallen"
    assert cause((1, 1e-7), (50, 1e-7)) == "The loss has not fallen"
    assert cause((50, 1e-7)) == "The loss has not fallen"


# Non-finite values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "placement", "evidence", "remedy"),
    [
        (NonFinite(3, "forward", "blocks.1.feed_forward", "inf"), "pre", "infinity", "bf16"),
        (NonFinite(3, "forward", "embedding", "nan"), "pre", "NaN", "isfinite"),
        (NonFinite(3, "forward", "blocks.1", "nan"), "pre", "NaN", "0/0"),
        (NonFinite(3, "forward", "blocks.0", "nan", "wte"), "pre", "wte, the last one", "between wte and it"),
        (NonFinite(3, "forward", "head", "nan", "norm"), "pre", "norm, the last one", "Check head, and what runs"),
        (NonFinite(3, "forward", "blocks.1", "inf"), "pre", "infinity", "another dtype"),
        (NonFinite(3, "loss", None, "nan"), "pre", "in the loss", "labels"),
        (NonFinite(3, "backward", "blocks.1.w", "nan"), "pre", "gradient of blocks.1.w", "square root"),
        (NonFinite(3, "optimizer", "blocks.1.w", "inf"), "pre", "weights of blocks.1.w", "ε"),
        (NonFinite(3, "elsewhere", "{layer}", "nan"), "pre", "in {layer}", ""),
    ],
)
def test_first_nonfinite_value_fails_with_its_place_and_a_remedy(
    found: NonFinite, placement: str, evidence: str, remedy: str
) -> None:
    history = History(facts=facts(), placement=placement, nonfinite=found)
    history.steps.append(Step(2, 3.0, 1.0, 1e-3))
    assert list(NonFiniteRule().on_step(history, history.steps[-1])) == []
    history.steps.append(Step(3, math.nan, 1.0, 1e-3))
    (alarm,) = NonFiniteRule().on_step(history, history.steps[-1])
    assert (alarm.step, alarm.severity, alarm.layer) == (3, "fail", found.layer)
    assert evidence in alarm.evidence
    assert 3 in numbers_in(alarm.evidence)
    assert remedy in alarm.remedy


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


STANDS = [(5, "nonfinite"), (300, "layer-jump"), (320, "odd-block")]
SKIPPED = NonFinite(5, "backward", "blocks.1.w", "nan")


def test_all_rules_are_judged_again_after_a_skipped_step() -> None:
    losses = [*FALLING[:4], math.nan, *FALLING[5:]]
    assert judged(losses, SKIPPED) == STANDS
    assert judged(FALLING, SKIPPED, [*[1.0] * 4, math.inf, *[1.0] * 315]) == STANDS


def test_no_other_alarm_is_raised_while_steps_are_not_finite() -> None:
    lost = [*FALLING[:4], *[math.nan] * 316]
    assert judged(lost, SKIPPED) == [(5, "nonfinite")]
    assert judged(FALLING, SKIPPED, [*[1.0] * 4, *[math.nan] * 316]) == [(5, "nonfinite")], "every step is skipped"
    two = [*FALLING[:4], *[math.nan, 3.0, 3.0] * 105, math.nan]
    assert judged(two, SKIPPED) == [(5, "nonfinite")], "never three in a row"


def test_relapse_after_a_recovery_is_reported() -> None:
    losses = [*FALLING[:4], math.nan, *FALLING[5:200], *[math.nan] * 120]
    assert judged(losses, SKIPPED) == [(5, "nonfinite"), (203, "nonfinite")]
    once = [*FALLING[:4], math.nan, *FALLING[5:200], math.nan, *FALLING[201:299]]
    assert judged(once, SKIPPED) == [(5, "nonfinite")]


@pytest.mark.parametrize(
    ("found", "placement", "evidence", "remedy"),
    [
        (NonFinite(3, "forward", "blocks.1", "nan"), "none", "NaN", "The blocks have no norm"),
        (NonFinite(3, "forward", "blocks.1", "-inf"), "none", "infinity", "bf16"),
        (NonFinite(3, "forward", None, "nan"), "pre", "in the output of the model", "isfinite"),
        (NonFinite(3, "backward", None, "overflow"), None, "The first overflow", "around the model"),
    ],
    ids=["no norm", "minus infinity", "no layer", "unknown value"],
)
def test_nonfinite_values_in_rare_places(found: NonFinite, placement: str | None, evidence: str, remedy: str) -> None:
    history = History(facts=facts(), placement=placement, nonfinite=found)
    history.samples.append(Sample(2, {}))
    assert list(NonFiniteRule().on_sample(history, history.samples[-1])) == []
    for step in (3, 4):
        history.samples.append(Sample(step, {}))
        (alarm,) = NonFiniteRule().on_sample(history, history.samples[-1])
        assert (alarm.step, alarm.layer) == (3, found.layer)
        assert evidence in alarm.evidence
        assert remedy in alarm.remedy


def test_three_finite_steps_are_a_recovery_and_two_are_not() -> None:
    lost = [*FALLING[:4], math.nan, *FALLING[5:8], *[math.nan] * 312]
    assert judged(lost, SKIPPED) == [(5, "nonfinite"), (11, "nonfinite")]
    assert judged([*FALLING[:4], math.nan, *FALLING[5:7], *[math.nan] * 313], SKIPPED) == [(5, "nonfinite")]
