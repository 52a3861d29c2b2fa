"""Where rules begin and end, exactly, and what they say in rare cases."""

from __future__ import annotations

import math

import pytest
from histories import Signals, facts, first, give_samples, give_steps, layers, noise, rates
from test_rules_runs import FALLING, SKIPPED, give, judged

from omninorm.watch import Alarm, History, NonFinite, NormFacts, Sample, Step
from omninorm.watch.rules import Rule
from omninorm.watch.rules.adam_eps import AdamEps
from omninorm.watch.rules.adam_underestimation import AdamUnderestimation
from omninorm.watch.rules.attention_entropy import AttentionEntropy
from omninorm.watch.rules.attention_logits import AttentionLogits
from omninorm.watch.rules.base import Threshold
from omninorm.watch.rules.branch_silent import BranchSilent
from omninorm.watch.rules.dead_units import DeadUnits
from omninorm.watch.rules.eps_share import EpsShare
from omninorm.watch.rules.gain_drift import GainDrift
from omninorm.watch.rules.gradient_spike import GradientSpike
from omninorm.watch.rules.layer_jump import LayerJump
from omninorm.watch.rules.learning_rate import LearningRate
from omninorm.watch.rules.logz import LogZ
from omninorm.watch.rules.loss_spike import LossSpike
from omninorm.watch.rules.massive_activation import MassiveActivation
from omninorm.watch.rules.no_norm import NoNorm
from omninorm.watch.rules.no_progress import NoProgress
from omninorm.watch.rules.nonfinite import NonFiniteRule
from omninorm.watch.rules.post_norm_depth import PostNormDepth
from omninorm.watch.rules.saturation import Saturation
from omninorm.watch.rules.unrecovered_spike import UnrecoveredSpike

pytestmark = pytest.mark.usefixtures("words")


def last(rule: Rule, samples: list[Signals], history: History | None = None) -> list[tuple[str, str | None]]:
    """Severity and layer of what the rule says at the last sample."""
    return [(alarm.severity, alarm.layer) for alarm in give_samples(rule, samples, history)[-1]]


# Thresholds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AttentionEntropy, AdamUnderestimation, DeadUnits, Saturation, EpsShare])
def test_a_threshold_itself_is_no_alarm(kind: type[Threshold]) -> None:
    limit = kind.warn
    assert limit is not None
    ordinary = 1.0 if kind.below else 0.0
    beyond = math.nextafter(limit, -math.inf if kind.below else math.inf)
    assert first(give_samples(kind(), [{kind.signal: layers(ordinary, limit, count=5)}] * 9)) is None
    assert first(give_samples(kind(), [{kind.signal: layers(ordinary, beyond, count=5)}] * 9)) is not None


def test_a_layer_that_is_not_known_does_not_hide_the_next() -> None:
    assert last(EpsShare(), [{"eps_share": [None, 0.6, 0.1, math.nan]}] * 5) == [
        ("fail", "blocks.1.norm"), ("warn", "blocks.2.norm"),
    ]  # fmt: skip
    assert last(AttentionLogits(), [{"attention_logit": [None, 2e4, 10.0, 2e3]}] * 2) == [
        ("fail", "blocks.1"), ("warn", "blocks.3"),
    ]  # fmt: skip


def test_an_eps_that_is_not_known() -> None:
    history = History(facts=facts(norms=(NormFacts("first", "RMSNorm", None, 0),)))
    assert last(EpsShare(), [{"eps_share": [0.6]}] * 5, history) == [("fail", "first")]
    history = History(facts=facts(adam_eps=None))
    assert last(AdamEps(), [{"adam_eps_ratio": [0.5] * 5}] * 5, history) == [("fail", "blocks.0.w")]
    assert last(AdamEps(), [{"adam_eps_ratio": [0.5] * 5}] * 5, History(facts=facts(adam_eps=0.0))) == []


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


def test_logits_grow_by_three_rises_or_more() -> None:
    def told(*values: float) -> int | None:
        return first(give_samples(AttentionLogits(), [{"attention_logit": layers(10.0, value)} for value in values]))

    assert told(10.0, 150.0, 160.0) is None, "two rises"
    assert told(10.0, 10.0, 150.0, 160.0, 170.0) is None, "it stood still"
    assert told(0.0, 10.0, 150.0, 160.0, 170.0) is None, "from nothing any growth is infinite"
    assert told(0.5, 10.0, 150.0, 160.0, 170.0) == 4
    assert told(40.0, 80.0, 110.0, 119.0, 120.0) is None, "3-fold"
    assert told(1e3, 1e3) is None


def test_massive_activations_against_a_median_of_zero() -> None:
    massive = [{"stream_max": layers(1.0, 101.0), "stream_median": layers(0.5, 0.0)}] * 5
    assert last(MassiveActivation(), massive) == [("warn", "blocks.2")]


# Order ----------------------------------------------------------------------------------------------------------------


def test_the_worst_gain_comes_first_and_gains_of_zero_before_it() -> None:
    start: Signals = {"gain_ratio": [1.0] * 4, "gain_max": [1.0] * 4}
    drifted: Signals = {"gain_ratio": [12.0, None, 30.0, 14.0], "gain_max": [1.0, 0.0, 1.0, 1.0]}
    assert last(GainDrift(), [start, *[drifted] * 4]) == [
        ("fail", "blocks.1.norm"), ("warn", "blocks.2.norm"), ("warn", "blocks.3.norm"), ("warn", "blocks.0.norm"),
    ]  # fmt: skip
    assert last(GainDrift(), [start, *[{**drifted, "gain_ratio": [10.0] * 4, "gain_max": [1.0] * 4}] * 4]) == []
    assert last(GainDrift(), [{"gain_small": layers(0.0, 0.5)}] * 5) == []


def test_the_weakest_block_comes_first() -> None:
    weak = [{"branch_ratio": [0.3, 0.009, 0.3, 0.005]}] * 8
    assert last(BranchSilent(), weak) == [("warn", "blocks.3"), ("warn", "blocks.1")]


# Losses ---------------------------------------------------------------------------------------------------------------


def test_a_loss_without_noise() -> None:
    (alarm,) = give_steps(LossSpike(), [*[3.0] * 20, 6.0])
    assert "100 % above its mean over the last 20 steps" in alarm.evidence


def test_a_loss_that_rose_over_several_steps() -> None:
    alarm = give_steps(LossSpike(), [*noise(100), 3.5, 6.0])[0]
    assert alarm.evidence.endswith("The model moved first: it rose over several steps.")


def test_a_gradient_is_to_blame_for_four_steps() -> None:
    for quiet, cause in ((4, "Harmful update"), (5, "Unusual batch")):
        norms = [*noise(90, 1.0), 9.0, *[1.0] * quiet]
        (alarm,) = give_steps(LossSpike(), [*noise(90 + quiet), 6.0], norms)
        assert alarm.evidence.startswith(cause)


def test_a_rate_is_to_blame_for_six_steps_from_two_fold_on() -> None:
    losses = [*noise(40), 6.0]
    for lrs in ([*[0.002] * 35, *[0.1] * 6], [*[0.002] * 39, 0.004, 0.004]):
        assert give(LossSpike(), losses, lrs)[0].evidence.startswith("Learning rate jumped")
    from_zero = [*[0.0] * 39, 0.1, 0.1]
    assert give(LossSpike(), losses, from_zero)[0].evidence.startswith("Unusual batch")


def test_a_sample_is_to_blame_for_two_intervals() -> None:
    for step, cause in ((21, "Updates too large"), (20, "Unusual batch")):
        history = History(facts=facts())
        history.samples.append(Sample(step, {"update_ratio": [0.3] * 5}))
        assert give(LossSpike(), [*noise(40), 6.0], [1e-3] * 41, history)[0].evidence.startswith(cause)


def test_twice_the_mean_of_sixteen_losses_is_high() -> None:
    for level in (3.0, 0.3):
        assert [alarm.step for alarm in give_steps(UnrecoveredSpike(), [*[level] * 16, *[2 * level] * 5])] == [21]
        assert give_steps(UnrecoveredSpike(), [*[level] * 15, *[2 * level] * 5]) == []


def test_half_of_a_fifth_of_the_first_loss() -> None:
    assert [alarm.step for alarm in give_steps(UnrecoveredSpike(), [*[5.0] * 4, *[4.0] * 128, *[4.5] * 5])] == [137]
    assert give_steps(UnrecoveredSpike(), [*[5.0] * 4, *[4.125] * 128, *[4.75] * 5]) == []


def test_gradient_spikes_need_64_steps_and_recur_within_64() -> None:
    for count, told in ((64, [66]), (63, [])):
        assert [alarm.step for alarm in give_steps(GradientSpike(), [3.0] * 70, [*noise(count, 1.0), 3.5, 3.5])] == told
    norms = noise(200, 1.0, 0.1)
    assert [alarm.step for alarm in give_steps(GradientSpike(), [3.0] * 300, [*norms, 3.4, *norms[:63], 3.4])] == [265]


# Non-finite values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "placement", "evidence", "remedy"),
    [
        (NonFinite(3, "forward", "blocks.1", "nan"), "none", "NaN", "The blocks have no norm"),
        (NonFinite(3, "forward", "blocks.1", "-inf"), "none", "infinity", "bf16"),
        (NonFinite(3, "forward", None, "nan"), "pre", "in the output of the model", "Look at the batch of step 3"),
        (NonFinite(3, "backward", None, "overflow"), None, "The first overflow", "in the model's part"),
    ],
    ids=["no norm", "minus infinity", "no layer", "another word"],
)
def test_nonfinite_in_rare_cases(found: NonFinite, placement: str | None, evidence: str, remedy: str) -> None:
    history = History(facts=facts(), placement=placement, nonfinite=found)
    history.samples.append(Sample(2, {}))
    assert list(NonFiniteRule().on_sample(history, history.samples[-1])) == []
    for step in (3, 4):
        history.samples.append(Sample(step, {}))
        (alarm,) = NonFiniteRule().on_sample(history, history.samples[-1])
        assert (alarm.step, alarm.layer) == (3, found.layer)
        assert evidence in alarm.evidence
        assert alarm.remedy.find(remedy) >= 0


def test_three_finite_steps_are_a_recovery_and_two_are_none() -> None:
    lost = [*FALLING[:4], math.nan, *FALLING[5:8], *[math.nan] * 312]
    assert judged(lost, SKIPPED) == [(5, "nonfinite"), (11, "nonfinite")]
    assert judged([*FALLING[:4], math.nan, *FALLING[5:7], *[math.nan] * 313], SKIPPED) == [(5, "nonfinite")]


# No progress ----------------------------------------------------------------------------------------------------------


def asked(rates: list[float], samples: list[tuple[int, float]]) -> list[Alarm]:
    """What is asked of 60 flat steps with these newest rates and updates."""
    history = History(facts=facts())
    history.samples.extend(Sample(step, {"update_ratio": [ratio] * 5}) for step, ratio in samples)
    return give(NoProgress(), noise(60), [*[1e-3] * (60 - len(rates)), *rates], history)


def test_a_rate_rises_from_the_first_to_the_last_of_twenty() -> None:
    assert len(asked([1e-3, 2e-3, *[1e-3] * 16, 2e-3, 1e-3], [])) == 1
    assert asked([1e-3, 3e-3, *[1e-3] * 17, 2e-3], []) == []
    assert len(asked([math.nan] * 19 + [1e-3], [])) == 1


def test_two_samples_tell_of_tiny_updates() -> None:
    def words(*samples: tuple[int, float]) -> str:
        return asked([], list(samples))[0].evidence.split(":")[0]

    tiny = "Updates change only 1e-07 of the weights"
    assert words((40, 1e-7), (50, 1e-7), (60, 1e-7)) == tiny
    assert words((2, 1e-7), (60, 1e-8)) == tiny
    assert words((40, 1e-7), (50, 1e-6)) == "The loss has not fallen"
    assert words((1, 1e-7), (50, 1e-7)) == "The loss has not fallen"
    assert words((50, 1e-7)) == "The loss has not fallen"


# A layer's jump -------------------------------------------------------------------------------------------------------


def jumped(
    factor: float, losses: list[float], updates: dict[int, float] | None = None, others: float = 1.0
) -> list[tuple[str, str | None]]:
    """What is said of a branch that rises by this factor at step 40, with the losses of 60 steps."""
    history = History(facts=facts())
    history.steps.extend(Step(step, loss, 1.0, 1e-3) for step, loss in enumerate(losses, start=1))
    samples: list[Signals] = [
        {
            "branch_ratio": layers(others, factor) if count >= 4 else layers(1.0),
            "update_ratio": [(updates or {}).get(10 * count, 1e-3)] * 5,
        }
        for count in range(7)
    ]
    return last(LayerJump(), samples, history)


WORSE = [*[50.0] * 20, *[20.0] * 19, *[21.0] * 21]


def test_a_jump_is_five_fold_and_huge_from_20_fold_on() -> None:
    assert jumped(5.0, WORSE) == [("warn", "blocks.2")]
    assert jumped(4.99, WORSE) == []
    assert jumped(19.9, WORSE) == [("warn", "blocks.2")]
    assert jumped(20.0, WORSE) == [("fail", "blocks.2")], "5 % worse than the 10 steps before"
    assert jumped(20.0, [*WORSE[:39], *[20.9] * 21]) == [("warn", "blocks.2")]
    assert jumped(20.0, [*WORSE[:55], *[20.0] * 5]) == [("warn", "blocks.2")], "the loss is back"
    assert jumped(20.0, WORSE, others=1.99) == [("fail", "blocks.2")]
    assert jumped(20.0, WORSE, others=2.0) == [], "they all rose"


def test_updates_are_to_blame_from_the_sample_before_a_jump_on() -> None:
    for step, severity in ((20, "fail"), (30, "warn"), (60, "warn")):
        assert jumped(20.0, WORSE, {step: 0.051}) == [(severity, "blocks.2")]
    assert jumped(20.0, WORSE, {30: 0.05}) == [("fail", "blocks.2")]


def test_a_jump_is_from_one_sample_to_the_next() -> None:
    steps: list[Signals] = [{"weight_rms": layers(1.0, value, count=5)} for value in (1.0, 1.0, 1.0, 4.0, 8.0, 16.0)]
    assert first(give_samples(LayerJump(), steps)) is None
    for others, told in (([1.0, 1.0], [("fail", "blocks.2")]), ([1.0, None], [])):
        few: list[Signals] = [{"weight_rms": [*others, value]} for value in (1.0, 1.0, 1.0, 5.0)]
        assert last(LayerJump(), few) == told, "of three layers two stayed; of two there is no telling which is wrong"


# Rates ----------------------------------------------------------------------------------------------------------------


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
    for step in range(1, 41):
        history.steps.append(Step(step, 5.0 if step <= 4 else 3.0, 1.0, 1e-3))
        assert list(rule.on_step(history, history.steps[-1])) == []
    assert last(rule, samples, history) == [(severity, None)]


# Depth ----------------------------------------------------------------------------------------------------------------


def test_no_norm_tells_of_the_gradient_too() -> None:
    stream, gradient = [1.0, 3.0, 9.0, 27.0], [81.0, 27.0, 9.0, 3.0]
    for signals in ({"stream_grad": gradient}, {"stream_rms": stream, "stream_grad": gradient}):
        assert last(NoNorm(), [signals], History(facts=facts(), placement="none")) == [("warn", None)]
    shrinking: Signals = {"stream_rms": stream[::-1]}
    assert last(NoNorm(), [shrinking], History(facts=facts(), placement="none")) == [("warn", None)]


@pytest.mark.parametrize(
    ("rates", "start", "words"),
    [([5e-4] * 9 + [1e-3] * 11, 1, "without warm-up"), ([4.9e-4] * 9 + [1e-3] * 11, 1, "with a warm-up"),
     ([1e-3] * 20, 7, ""), ([math.nan] * 20, 1, "")],
)  # fmt: skip
def test_post_norm_in_twelve_blocks(rates: list[float], start: int, words: str) -> None:
    history, rule = History(facts=facts(12), placement="post"), PostNormDepth()
    for step, rate in enumerate(rates, start=start):
        history.steps.append(Step(step, 5.0, 1.0, rate))
        assert list(rule.on_step(history, history.steps[-1])) == []
    (alarm,) = give_samples(rule, [{"stream_grad": [0.009, *[1.0] * 11]}] * 3, history)[-1]
    assert words in alarm.evidence
    assert ("warm-up" in alarm.evidence) is bool(words)


def test_logz_where_its_mean_is_not_known() -> None:
    drifting: list[Signals] = [{"logz": [10.0 + 3.0 * count]} for count in range(12)]
    assert last(LogZ(), drifting) == [("warn", None)]
    both: list[Signals] = [{"logz": [10.0 + 3.0 * count], "logz_mean": [10.0]} for count in range(12)]
    assert last(LogZ(), both) == []
    ten: list[Signals] = [{"logz": [0.0]}, *[{"logz": [9.0 + 0.1 * count]} for count in range(11)]]
    assert last(LogZ(), ten) == []
