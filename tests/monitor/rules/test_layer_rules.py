"""Rules about layers and depth: jumps, silent branches, drifting gains, and growth of the stream and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.histories import BLOCKS, Signals, facts, first, give_samples, give_steps, last, layers, numbers_in
from helpers.tiny_runs import TinyGPT, of_rule, train_tiny

from omninorm.monitor import Alarm, History, NonFinite, NormFacts, Step
from omninorm.monitor.alarms import Judge
from omninorm.monitor.rules.branch_silent import BranchSilent
from omninorm.monitor.rules.dead_units import DeadUnits
from omninorm.monitor.rules.depth_growth import DepthGrowth
from omninorm.monitor.rules.gain_drift import GainDrift
from omninorm.monitor.rules.layer_jump import LayerJump
from omninorm.monitor.rules.logz import LogZ
from omninorm.monitor.rules.no_norm import NoNorm
from omninorm.monitor.rules.post_norm_depth import PostNormDepth
from omninorm.monitor.rules.stream_growth import StreamGrowth

pytestmark = pytest.mark.usefixtures("words")

# Dead units -----------------------------------------------------------------------------------------------------------


def test_dead_units_do_not_presume_an_activation() -> None:
    """Other activations can be 0 as well, so the remedy for a ReLU is a condition."""
    (alarm,) = give_samples(DeadUnits(), [{"dead_units": layers(0.0, share)} for share in (0.1, *[0.6] * 4)])[-1]
    assert "if the activation is a relu" in alarm.remedy.lower()


def test_units_that_were_dead_at_the_first_sample_are_a_matter_of_the_initialization() -> None:
    (alarm,) = give_samples(DeadUnits(), [{"dead_units": layers(0.0, 0.6)}] * 5)[-1]
    assert "It was 60 % at step 1." in alarm.evidence
    assert "initialization" in alarm.remedy


# Growth of the residual stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "now", "severity"),
    [(1.0, 0.99e4, None), (1.0, 1.01e4, "warn"), (1.0, 0.99e6, "warn"), (1.0, 1.01e6, "fail"), (1e-6, 9e3, None),
     (1e3, 9e6, None)],
)  # fmt: skip
def test_exploded_stream_names_the_first_such_block(first: float, now: float, severity: str | None) -> None:
    before = {"stream_rms": [first, first, first, first]}
    after = {"stream_rms": [2 * first, now, now, now]}
    reports = give_samples(StreamGrowth(), [before, after, after, before])
    severities = [[alarm.severity for alarm in alarms] for alarms in reports]
    assert severities == [[], [], [severity] if severity else [], []], "after two samples"
    assert not severity or reports[2][0].layer == "blocks.1"


def test_branches_in_an_exploded_stream_are_not_called_silent() -> None:
    quiet = {"attention_ratio": layers(1e-7), "stream_rms": layers(1.0)}
    assert give_samples(BranchSilent(), [quiet] * 8)[-1]
    grown = {"attention_ratio": layers(1e-7), "stream_rms": layers(2e4)}
    assert not any(give_samples(BranchSilent(), [{"stream_rms": layers(1.0)}, *[grown] * 8]))


# Jumps ----------------------------------------------------------------------------------------------------------------


def test_layer_jump_names_the_weights_that_jumped() -> None:
    before = {"weight_rms": layers(0.1, count=5), "stream_rms": layers(1.0)}
    after = {"weight_rms": layers(0.1, 5.0, count=5), "stream_rms": [1.0, 1.0, 90.0, 91.0]}
    reports = give_samples(LayerJump(), [*[before] * 5, after, after, before])
    assert [[(alarm.severity, alarm.layer) for alarm in alarms] for alarms in reports] == [
        *[[]] * 5, [("fail", "blocks.2")], [("fail", "blocks.2")], [],
    ]  # fmt: skip
    assert "RMS of the weights" in reports[5][0].evidence
    assert numbers_in(reports[5][0].evidence) == [50, 50, 0.1, 5], "50-fold by step 50, from 0.1 to 5"


def test_jump_of_a_gain_names_the_norm() -> None:
    before, after = {"gain_max": layers(1.0)}, {"gain_max": layers(1.0, 100.0)}
    assert give_samples(LayerJump(), [*[before] * 3, after])[-1][0].layer == "blocks.2.norm"


@pytest.mark.parametrize(("factor", "expected"), [(4.9, None), (5.1, "warn"), (19.0, "warn"), (21.0, "fail")])
def test_jump_of_the_stream_names_the_first_block(factor: float, expected: str | None) -> None:
    before, after = {"stream_rms": layers(1.0, count=8)}, {"stream_rms": [*[1.0] * 5, *[factor] * 3]}
    history = History(facts=facts(8))
    history.steps.extend(Step(step, 3.0 if step < 35 else 3.2, 1.0, 1e-3) for step in range(1, 51))
    reports = give_samples(LayerJump(), [*[before] * 4, after, after], history)
    assert first(reports) == (5 if expected else None)
    if expected:
        assert [(alarm.severity, alarm.layer) for alarm in reports[-1]] == [(expected, "blocks.5")]


def test_jump_of_all_layers_is_no_layer_jump() -> None:
    before, after = {"weight_rms": layers(0.1, count=5)}, {"weight_rms": layers(1.0, count=5)}
    assert first(give_samples(LayerJump(), [*[before] * 5, after, after])) is None


def test_slow_growth_and_initialization_to_zero_are_no_jump() -> None:
    slow = [{"weight_rms": layers(0.1, 0.1 * 1.5**count, count=5)} for count in range(20)]
    assert first(give_samples(LayerJump(), slow)) is None
    start = [{"weight_rms": layers(0.1, 1e-3 * count, count=5)} for count in range(20)]
    assert first(give_samples(LayerJump(), start)) is None


@pytest.mark.parametrize(("last", "jumps"), [(34.0, False), (36.0, True)])
def test_branch_that_grows_sevenfold_per_sample_jumps_only_if_it_grows_much_faster(last: float, jumps: bool) -> None:
    """The feed-forward of a healthy OLMo-2 does so in the first steps."""
    grown = [{"feed_forward_ratio": layers(0.3, value)} for value in (0.02 / 7, 0.02 / 7, 0.02, 0.02 * last)]
    assert bool(give_samples(LayerJump(), [*grown, grown[-1]])[-1]) == jumps


@pytest.mark.parametrize(("after", "severity"), [(2.9, "warn"), (3.14, "warn"), (3.16, "fail"), (math.nan, "warn")])
def test_jump_of_a_block_and_its_part_is_one_alarm(after: float, severity: str) -> None:
    before = {"branch_ratio": layers(0.3), "feed_forward_ratio": layers(0.2), "weight_rms": layers(0.1, count=5)}
    jumped = {**before, "branch_ratio": layers(0.3, 20.1), "feed_forward_ratio": layers(0.2, 26.4)}
    history = History(facts=facts())
    history.steps.extend(Step(step, 3.0 if step < 35 else after, 1.0, 1e-3) for step in range(1, 51))
    reports = give_samples(LayerJump(), [*[before] * 4, jumped, jumped], history)
    assert [(alarm.severity, alarm.layer) for alarm in reports[-1]] == [(severity, "blocks.2")]
    assert "feed-forward" in reports[-1][0].evidence


def test_jump_of_activations_after_large_updates_is_a_warning_about_the_learning_rate() -> None:
    for ratio, severity in ((0.049, "fail"), (0.17, "warn")):
        before = {"branch_ratio": layers(0.3), "update_ratio": [ratio] * 5}
        jumped = {**before, "branch_ratio": layers(0.3, 20.1)}
        history = History(facts=facts())
        history.steps.extend(Step(step, 3.0 if step < 35 else 4.0, 1.0, 1e-3) for step in range(1, 51))
        (alarm,) = give_samples(LayerJump(), [*[before] * 4, jumped, jumped], history)[-1]
        assert alarm.severity == severity
        assert ("warm-up" in alarm.remedy) is (severity == "warn")


def jumped(
    factor: float, losses: list[float], updates: dict[int, float] | None = None, others: float = 1.0
) -> list[tuple[str, str | None]]:
    """Severity and layer of the alarms about a branch that rises by a factor at step 40, with the losses of 60 steps."""
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


def test_jump_warns_from_five_fold_on_and_fails_from_20_fold_on_if_the_loss_rose() -> None:
    assert jumped(5.0, WORSE) == [("warn", "blocks.2")]
    assert jumped(4.99, WORSE) == []
    assert jumped(19.9, WORSE) == [("warn", "blocks.2")]
    assert jumped(20.0, WORSE) == [("fail", "blocks.2")], "5 % worse than the 10 steps before"
    assert jumped(20.0, [*WORSE[:39], *[20.9] * 21]) == [("warn", "blocks.2")]
    assert jumped(20.0, [*WORSE[:55], *[20.0] * 5]) == [("warn", "blocks.2")], "the loss is back"
    assert jumped(20.0, WORSE, others=1.99) == [("fail", "blocks.2")]
    assert jumped(20.0, WORSE, others=2.0) == [], "they all rose"


def test_large_updates_since_the_sample_before_a_jump_are_the_cause() -> None:
    for step, severity in ((20, "fail"), (30, "warn"), (60, "warn")):
        assert jumped(20.0, WORSE, {step: 0.051}) == [(severity, "blocks.2")]
    assert jumped(20.0, WORSE, {30: 0.05}) == [("fail", "blocks.2")]


def test_jump_happens_between_two_samples_and_needs_two_other_layers() -> None:
    steps: list[Signals] = [{"weight_rms": layers(1.0, value, count=5)} for value in (1.0, 1.0, 1.0, 4.0, 8.0, 16.0)]
    assert first(give_samples(LayerJump(), steps)) is None
    for others, expected in (([1.0, 1.0], [("fail", "blocks.2")]), ([1.0, None], [])):
        few: list[Signals] = [{"weight_rms": [*others, value]} for value in (1.0, 1.0, 1.0, 5.0)]
        assert last(LayerJump(), few) == expected, "with two layers it is unknown which of them is wrong"


# Blocks that are silent -----------------------------------------------------------------------------------------------


def test_silent_block_or_part_fails_after_its_persistence() -> None:
    alive = {"branch_ratio": layers(0.3), "attention_ratio": layers(0.2), "feed_forward_ratio": layers(0.2)}
    for signal, layer in (
        ("branch_ratio", "blocks.2"),
        ("attention_ratio", "blocks.2.attention"),
        ("feed_forward_ratio", "blocks.2.feed_forward"),
    ):
        dead = {**alive, signal: layers(0.3, 0.0)}
        reports = give_samples(BranchSilent(), [alive, alive, dead, dead, dead])
        assert first(reports) == 4, "it contributed before, so three samples are enough"
        assert [(alarm.severity, alarm.layer) for alarm in reports[4]] == [("fail", layer)]
        assert first(give_samples(BranchSilent(), [*[dead] * 2, alive])) is None, (
            "zero-initialized branches change with their first update"
        )
        assert first(give_samples(BranchSilent(), [dead] * 9)) == 3, "always exactly 0"
        tiny = {**alive, signal: layers(0.3, 1e-7)}
        assert first(give_samples(BranchSilent(), [*[tiny] * 5, alive])) is None, (
            "a branch that was never alive gets more time"
        )
        assert first(give_samples(BranchSilent(), [tiny] * 9)) == 6
        assert first(give_samples(BranchSilent(), [dead, *[tiny] * 8])) == 6


def test_weak_block_is_a_warning() -> None:
    reports = give_samples(BranchSilent(), [{"branch_ratio": layers(0.3, 0.009)}] * 8)
    assert first(reports) == 6
    assert {(alarm.severity, alarm.layer) for alarm in reports[-1]} == {("warn", "blocks.2")}
    assert first(give_samples(BranchSilent(), [{"branch_ratio": layers(0.3, 0.011)}] * 8)) is None


def test_stream_of_zeros_names_the_first_block() -> None:
    alive = {"stream_rms": layers(1.0), "branch_ratio": layers(0.3)}
    dead = {"stream_rms": [1.0, 0.0, 0.0, 0.0], "branch_ratio": [0.3, 1.0, None, None]}
    assert give_samples(BranchSilent(), [alive, dead, dead, dead])[-1][0].layer == "blocks.1"


def test_weakest_block_is_reported_first() -> None:
    weak = [{"branch_ratio": [0.3, 0.009, 0.3, 0.005]}] * 8
    assert last(BranchSilent(), weak) == [("warn", "blocks.3"), ("warn", "blocks.1")]


# Gains ----------------------------------------------------------------------------------------------------------------


def test_gain_ratio_that_drifts_and_gains_near_zero_are_warnings() -> None:
    drifted = [{"gain_ratio": layers(1.0, ratio), "gain_max": layers(1.0)} for ratio in (1.0, 2.0, *[11.0] * 4)]
    reports = give_samples(GainDrift(), drifted)
    assert first(reports) == 4
    assert [(alarm.severity, alarm.layer) for alarm in reports[4]] == [("warn", "blocks.2.norm")]
    short = [{"gain_ratio": layers(1.0, ratio)} for ratio in (1.0, *[9.9] * 9)]
    assert first(give_samples(GainDrift(), short)) is None
    pretrained = [{"gain_ratio": layers(1.0, 20.0)}] * 9
    assert first(give_samples(GainDrift(), pretrained)) is None, "it did not drift in this run"
    fallen = [{"gain_small": layers(0.0, share)} for share in (0.0, *[0.6] * 4)]
    assert first(give_samples(GainDrift(), fallen)) == 3


def test_gains_of_zero_fail_immediately_if_frozen() -> None:
    zero = {"gain_max": layers(1.0, 0.0), "gain_small": layers(0.0, 1.0)}
    learning = give_samples(GainDrift(), [zero] * 4)
    assert first(learning) == 3
    assert [(alarm.severity, alarm.layer) for alarm in learning[3]] == [("fail", "blocks.2.norm")]
    frozen = tuple(NormFacts(f"blocks.{index}.norm", "RMSNorm", 1e-6, index, frozen=True) for index in range(BLOCKS))
    history = History(facts=facts(norms=frozen))
    reports = give_samples(GainDrift(), [zero], history)
    assert [(alarm.severity, alarm.layer) for alarm in reports[0]] == [("fail", "blocks.2.norm")]
    assert "requires_grad" in reports[0][0].remedy


def test_gains_of_zero_are_reported_first_then_the_largest_ratio() -> None:
    start: Signals = {"gain_ratio": [1.0] * 4, "gain_max": [1.0] * 4}
    drifted: Signals = {"gain_ratio": [12.0, None, 30.0, 14.0], "gain_max": [1.0, 0.0, 1.0, 1.0]}
    assert last(GainDrift(), [start, *[drifted] * 4]) == [
        ("fail", "blocks.1.norm"), ("warn", "blocks.2.norm"), ("warn", "blocks.3.norm"), ("warn", "blocks.0.norm"),
    ]  # fmt: skip
    assert last(GainDrift(), [start, *[{**drifted, "gain_ratio": [10.0] * 4, "gain_max": [1.0] * 4}] * 4]) == []
    assert last(GainDrift(), [{"gain_small": layers(0.0, 0.5)}] * 5) == []


# Depth ----------------------------------------------------------------------------------------------------------------


def over_depth(ratio: float, blocks: int, linear: bool = False) -> list[float]:
    """Growth from 1 to `ratio`: exponential, or with a variance that grows linearly."""
    if linear:
        return [math.sqrt(1 + (ratio**2 - 1) * index / (blocks - 1)) for index in range(blocks)]
    return [ratio ** (index / (blocks - 1)) for index in range(blocks)]


@pytest.mark.parametrize(
    ("ratio", "blocks", "linear", "expected"),
    [
        (99.0, 24, False, None),  # below 100-fold
        (101.0, 24, False, "warn"),
        (1e5, 24, True, None),  # linear variance, as in healthy pre-norm
        (2e4, 24, False, "fail"),
        (2e4, 60, False, "warn"),  # exponent 0.165
        (101.0, 100, False, None),  # exponent 0.046
    ],
)
def test_depth_growth_needs_a_large_exponent_total_and_an_exponential(
    ratio: float, blocks: int, linear: bool, expected: str | None
) -> None:
    values = over_depth(ratio, blocks, linear)
    for signals in ({"stream_rms": values}, {"stream_grad": values[::-1]}, {"stream_grad": [1e-9 * v for v in values]}):
        if linear and "stream_grad" in signals:
            continue
        reports = give_samples(DepthGrowth(), [signals] * 5, History(facts=facts(blocks), placement="pre"))
        assert first(reports) == (3 if expected else None)
        if expected:
            assert [(alarm.severity, alarm.layer) for alarm in reports[-1]] == [(expected, None)]
            assert "pre-norm" in reports[-1][0].evidence


@pytest.mark.parametrize(
    ("ratio", "placement", "steps", "severity"),
    [(101.0, "pre", 20, "warn"), (101.0, "post", 80, "warn"), (9e-3, "post", 20, "warn"), (1.1e4, "post", 20, "fail")],
)
def test_shrinking_gradient_of_a_post_norm_model_warns_after_80_steps(
    ratio: float, placement: str, steps: int, severity: str
) -> None:
    """Only its last blocks learn at first. A gradient that grows, or nearly vanishes, is reported as elsewhere."""
    signals = {"stream_grad": over_depth(ratio, 24)}
    reports = give_samples(DepthGrowth(), [signals] * 12, History(facts=facts(24), placement=placement))
    begins = first(reports)
    assert begins == 1 + steps // 10
    assert [alarm.severity for alarm in reports[begins]] == [severity]


def test_no_norm_needs_a_large_exponent_and_blocks_without_norms() -> None:
    def report(ratio: float, placement: str | None = "none", blocks: int = 8) -> list[str]:
        history = History(facts=facts(blocks), placement=placement)
        return [
            alarm.severity for alarm in give_samples(NoNorm(), [{"stream_rms": over_depth(ratio, blocks)}], history)[0]
        ]

    assert report(101.0) == ["fail"]
    assert report(99.0) == ["warn"]
    assert report(7.9) == []
    assert report(99.0, blocks=24) == [], "exponent 0.19"
    assert report(1e6, placement="pre") == []
    assert report(1e6, placement=None) == [], "the facts list norms in the blocks"


def test_overflow_without_norms_is_reported_as_no_norm_first() -> None:
    history = History(facts=facts(norms=(NormFacts("final", "RMSNorm"),)))
    history.nonfinite = NonFinite(1, "forward", "blocks.3.attention", "nan")
    history.steps.append(Step(1, math.nan, math.nan, 1e-3))
    alarms = Judge().judge_steps(history, list(history.steps))
    assert [alarm.rule for alarm in alarms] == ["no-norm", "nonfinite"]
    assert "blocks.3.attention" in alarms[0].evidence


def post(blocks: int, ratio: float, first_rate: float, placement: str = "post") -> list[Alarm]:
    history, rule = History(facts=facts(blocks), placement=placement), PostNormDepth()
    assert give_steps(rule, [5.0] * 20, lrs=[first_rate] * 9, history=history) == []
    return give_samples(rule, [{"stream_grad": [ratio, *[1.0] * (blocks - 1)]}] * 3, history)[-1]


def test_vanishing_gradient_in_deep_post_norm_fails() -> None:
    (alarm,) = post(24, 0.0099, 1e-3)
    assert (alarm.severity, alarm.layer) == ("fail", None)
    assert "without a warm-up" in alarm.evidence
    assert numbers_in(alarm.evidence) == [24, 101, 0.001], "blocks, 1/0.0099, first learning rate"
    (warmed,) = post(24, 0.0099, 1e-4)
    assert "with a warm-up" in warmed.evidence
    assert numbers_in(warmed.evidence)[-1] == 1e-4
    assert "longer warm-up" in warmed.remedy
    assert "longer" not in alarm.remedy
    assert post(24, 0.011, 1e-3) == []
    assert post(11, 0.0099, 1e-3) == []
    assert post(24, 0.0099, 1e-3, "pre") == []


def test_logz_that_keeps_drifting_is_a_warning() -> None:
    drifting = [{"logz_mean": [10.8 + 3.0 * count]} for count in range(20)]
    reports = give_samples(LogZ(), drifting)
    assert first(reports) == 9, "more than 10 away from step 40 on, five samples and 50 steps long"
    assert reports[9][0].severity == "warn"
    assert first(give_samples(LogZ(), [{"logz_mean": [10.8]}, *[{"logz_mean": [30.0]}] * 9])) == 6
    settled = give_samples(LogZ(), [{"logz_mean": [10.8]}, *[{"logz_mean": [30.0]}] * 20])
    assert settled[-1] == [], "it has stopped drifting"
    assert first(give_samples(LogZ(), [{"logz_mean": [30.0]}] * 20)) is None


def test_no_norm_reports_the_gradient_as_well() -> None:
    stream, gradient = [1.0, 3.0, 9.0, 27.0], [81.0, 27.0, 9.0, 3.0]
    for signals in ({"stream_grad": gradient}, {"stream_rms": stream, "stream_grad": gradient}):
        assert last(NoNorm(), [signals], History(facts=facts(), placement="none")) == [("warn", None)]
    shrinking: Signals = {"stream_rms": stream[::-1]}
    assert last(NoNorm(), [shrinking], History(facts=facts(), placement="none")) == [("warn", None)]


@pytest.mark.parametrize(
    ("rates", "start", "words"),
    [([5e-4] * 9 + [1e-3] * 11, 1, "without a warm-up"), ([4.9e-4] * 9 + [1e-3] * 11, 1, "with a warm-up"),
     ([1e-3] * 20, 7, ""), ([math.nan] * 20, 1, "")],
)  # fmt: skip
def test_post_norm_alarm_mentions_the_warm_up_if_the_first_learning_rate_is_known(
    rates: list[float], start: int, words: str
) -> None:
    history, rule = History(facts=facts(12), placement="post"), PostNormDepth()
    assert give_steps(rule, [5.0] * 20, lrs=rates, history=history, start=start) == []
    (alarm,) = give_samples(rule, [{"stream_grad": [0.009, *[1.0] * 11]}] * 3, history)[-1]
    assert words in alarm.evidence
    assert ("warm-up" in alarm.evidence) is bool(words)


def test_logz_is_judged_where_its_mean_is_unknown() -> None:
    drifting: list[Signals] = [{"logz": [10.0 + 3.0 * count]} for count in range(12)]
    assert last(LogZ(), drifting) == [("warn", None)]
    both: list[Signals] = [{"logz": [10.0 + 3.0 * count], "logz_mean": [10.0]} for count in range(12)]
    assert last(LogZ(), both) == []
    ten: list[Signals] = [{"logz": [0.0]}, *[{"logz": [9.0 + 0.1 * count]} for count in range(11)]]
    assert last(LogZ(), ten) == []


# The optimizer's own updates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("update", "own"), [(0.051, True), (0.049, False)])
def test_jump_that_the_updates_explain_names_the_optimizer(update: float, own: bool) -> None:
    """Over 10 steps, updates of 5 % add up to half of the weights."""
    before = {"weight_rms": layers(0.1, count=5), "update_ratio": [*layers(0.001, update), 0.9]}
    after = {**before, "weight_rms": layers(0.1, 5.0, count=5)}
    (alarm,) = give_samples(LayerJump(), [*[before] * 5, after])[-1]
    assert (alarm.severity, alarm.layer) == ("fail", "blocks.2")
    assert ("β₂" in alarm.remedy) is own
    assert ("Training alone does not do this" in alarm.remedy) is not own


def test_jump_of_a_gain_is_compared_with_the_updates_of_its_block() -> None:
    before = {"gain_max": layers(1.0), "update_ratio": [*layers(0.001, 0.3), 0.001]}
    (alarm,) = give_samples(LayerJump(), [*[before] * 3, {**before, "gain_max": layers(1.0, 10.0)}])[-1]
    assert "β₂" in alarm.remedy
    (alarm,) = give_samples(LayerJump(), [*[before] * 3, {**before, "gain_max": layers(1.0, 10.0, at=1)}])[-1]
    assert "β₂" not in alarm.remedy


def test_adam_with_a_tiny_second_beta_is_named_as_the_cause() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    watched, _ = train_tiny(model, torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.1)), steps=40)
    jumps = of_rule(watched, "layer-jump")
    assert jumps
    assert all("β₂" in alarm.remedy or "learning rate" in alarm.remedy for alarm in jumps)
