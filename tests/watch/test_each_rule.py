"""Each rule on made-up histories: it fires at the right place, not just below, and not before it has lasted."""

from __future__ import annotations

import math
import random

import pytest
from histories import BLOCKS, Signals, facts, first, give_samples, give_steps, layers, noise, rates

from omninorm.record.signals import SIGNALS
from omninorm.watch import Alarm, History, NonFinite, NormFacts, Sample, Step
from omninorm.watch.judge import Judge
from omninorm.watch.rules import Rule, default_rules
from omninorm.watch.rules.adam_eps import AdamEps
from omninorm.watch.rules.adam_underestimation import AdamUnderestimation
from omninorm.watch.rules.attention_entropy import AttentionEntropy
from omninorm.watch.rules.attention_logits import AttentionLogits
from omninorm.watch.rules.branch_silent import BranchSilent
from omninorm.watch.rules.dead_units import DeadUnits
from omninorm.watch.rules.depth_growth import DepthGrowth
from omninorm.watch.rules.eps_share import EpsShare
from omninorm.watch.rules.gain_drift import GainDrift
from omninorm.watch.rules.gradient_spike import GradientSpike
from omninorm.watch.rules.headroom import Headroom
from omninorm.watch.rules.layer_jump import LayerJump
from omninorm.watch.rules.learning_rate import LearningRate
from omninorm.watch.rules.logz import LogZ
from omninorm.watch.rules.loss_spike import LossSpike
from omninorm.watch.rules.massive_activation import MassiveActivation
from omninorm.watch.rules.no_norm import NoNorm
from omninorm.watch.rules.nonfinite import NonFiniteRule
from omninorm.watch.rules.post_norm_depth import PostNormDepth
from omninorm.watch.rules.saturation import Saturation
from omninorm.watch.rules.unrecovered_spike import UnrecoveredSpike

pytestmark = pytest.mark.usefixtures("words")

# Rules that compare a signal with thresholds ---------------------------------------------------------------------------

# rule, signal, ordinary value, a value that warns, one just short of it, one that fails (None: it never does),
# one that warns and is just short of failing, samples until it is reported, layer
THRESHOLDS = [
    (AttentionEntropy, "attention_entropy", 0.8, 0.029, 0.031, None, 0.001, 3, "blocks.2"),
    (AttentionLogits, "attention_logit", 10.0, 1.01e3, 0.99e3, 1.01e4, 0.99e4, 2, "blocks.2"),
    (AdamUnderestimation, "adam_ratio", 1.0, 2.4, 2.2, None, 100.0, 5, "blocks.2"),
    (DeadUnits, "dead_units", 0.0, 0.11, 0.09, None, 1.0, 3, "blocks.2"),
    (Saturation, "saturation", 0.1, 0.51, 0.49, None, 1.0, 3, "blocks.2.norm"),
    (EpsShare, "eps_share", 1e-4, 0.06, 0.04, 0.51, 0.49, 3, "blocks.2.norm"),
]


@pytest.mark.parametrize(
    ("kind", "signal", "ordinary", "warns", "short", "fails", "almost", "samples", "layer"), THRESHOLDS
)
def test_thresholds(
    kind: type[Rule], signal: str, ordinary: float, warns: float, short: float,
    fails: float | None, almost: float, samples: int, layer: str,
) -> None:  # fmt: skip
    count = BLOCKS + (SIGNALS[signal].axis == "group")
    sick = {signal: layers(ordinary, warns, count=count)}
    reports = give_samples(kind(), [sick] * 8)
    # The first sample is at step 1, so that three span 19 of 20 steps, and five 39 of 50.
    wait = {2: 1, 3: 3, 5: 6}[samples]
    assert first(reports) == wait
    assert [(alarm.severity, alarm.layer, alarm.rule) for alarm in reports[wait]] == [("warn", layer, kind.name)]
    assert first(give_samples(kind(), [{signal: layers(ordinary, short, count=count)}] * 8)) is None
    almost_reports = give_samples(kind(), [{signal: layers(ordinary, almost, count=count)}] * 8)
    assert {alarm.severity for alarms in almost_reports for alarm in alarms} == {"warn"}
    if fails is not None:
        failing = give_samples(kind(), [{signal: layers(ordinary, fails, count=count)}] * 8)
        assert failing[wait][0].severity == "fail"


@pytest.mark.parametrize("row", THRESHOLDS, ids=lambda row: row[0].name)
def test_an_interruption_starts_anew_and_a_gap_does_not(row: tuple) -> None:
    kind, signal, ordinary, warns, *_ = row
    count = BLOCKS + (SIGNALS[signal].axis == "group")
    sick, well = {signal: layers(ordinary, warns, count=count)}, {signal: layers(ordinary, count=count)}
    gap = {signal: [None] * count}
    assert first(give_samples(kind(), [sick, well] * 6)) is None
    assert first(give_samples(kind(), [sick, gap, sick, gap, sick, sick, sick, sick])) is not None


def test_eps_share_names_the_norm_and_its_eps() -> None:
    norms = (NormFacts("first", "RMSNorm", 0.1, 0), NormFacts("second", "LayerNorm", 0.1, 1))
    history = History(facts=facts(norms=norms))
    alarm, *_ = give_samples(EpsShare(), [{"eps_share": [0.86, 0.05]}] * 4, history)[-1]
    assert (alarm.severity, alarm.layer) == ("fail", "first")
    assert "ε = 0.1 makes up 86 %" in alarm.evidence
    assert "mean(x²) is 0.016" in alarm.remedy


def test_an_extreme_eps_share_is_told_at_its_second_sample() -> None:
    reports = give_samples(EpsShare(), [{"eps_share": layers(1e-4, 0.91)}] * 2)
    assert [[alarm.severity for alarm in alarms] for alarms in reports] == [[], ["fail"]]
    assert first(give_samples(EpsShare(), [{"eps_share": layers(1e-4, 0.89)}] * 2)) is None
    assert first(give_samples(EpsShare(), [{"eps_share": layers(1e-4, 1.0)}, {"eps_share": layers(1e-4)}] * 4)) is None


def test_massive_activations_need_both_conditions() -> None:
    def signals(largest: float, middle: float | None) -> Signals:
        return {"stream_max": layers(1.0, largest), "stream_median": layers(0.5, middle)}

    assert first(give_samples(MassiveActivation(), [signals(101.0, 0.1)] * 5)) == 3
    assert first(give_samples(MassiveActivation(), [signals(99.0, 0.001)] * 5)) is None
    assert first(give_samples(MassiveActivation(), [signals(101.0, 0.11)] * 5)) is None
    assert first(give_samples(MassiveActivation(), [{"stream_max": layers(1.0, 1e9)}] * 5)) is None


def test_headroom_matters_in_fp16_only() -> None:
    signals = [{"stream_max": layers(1.0, 7000.0)}]
    for dtype, expected in (("float16", ["warn"]), ("bfloat16", []), (None, [])):
        history = History(facts=facts(), dtype=dtype)
        assert [alarm.severity for alarm in give_samples(Headroom(), signals, history)[0]] == expected
    history = History(facts=facts(), dtype="float16")
    assert give_samples(Headroom(), [{"stream_max": layers(1.0, 65504.0)}], history)[0][0].severity == "fail"


def test_the_worst_layer_comes_first() -> None:
    reports = give_samples(AttentionLogits(), [{"attention_logit": [2e3, 5e4, 3e3, 10.0]}] * 2)
    assert [(alarm.layer, alarm.severity) for alarm in reports[-1]] == [
        ("blocks.1", "fail"), ("blocks.2", "warn"), ("blocks.0", "warn"),
    ]  # fmt: skip
    reports = give_samples(AttentionEntropy(), [{"attention_entropy": [0.02, 0.5, 0.01, 0.5]}] * 4)
    assert [alarm.layer for alarm in reports[-1]] == ["blocks.2", "blocks.0"]


def test_logits_on_their_way_are_reported_early() -> None:
    values = [10 * 1.5**count for count in range(20)]
    reports = give_samples(AttentionLogits(), [{"attention_logit": layers(10.0, value)} for value in values])
    warned = first(reports)
    failed = next(index for index, alarms in enumerate(reports) if any(alarm.severity == "fail" for alarm in alarms))
    assert warned is not None
    assert 100 < values[warned] < 1e3
    assert values[failed] < 1e4
    wobbling = [10 * 1.5 ** (count // 2) * (2 if count % 2 else 1) for count in range(10)]
    assert (
        first(give_samples(AttentionLogits(), [{"attention_logit": layers(10.0, value)} for value in wobbling])) is None
    )


# Spikes ---------------------------------------------------------------------------------------------------------------


def test_loss_spike() -> None:
    assert give_steps(LossSpike(), noise(500)) == []
    assert give_steps(LossSpike(), [*noise(200), 3.59, *noise(50)]) == []  # 12σ, but less than 20 %
    assert give_steps(LossSpike(), [*noise(200, spread=0.2), 4.0, *noise(50)]) == []  # 33 %, but 5σ
    alarms = give_steps(LossSpike(), [*noise(200), 4.0, *noise(50)])
    assert [(alarm.step, alarm.severity, alarm.layer) for alarm in alarms] == [(201, "warn", None)]
    assert "above its mean over the last 128 steps" in alarms[0].evidence


def test_a_spike_does_not_hide_the_next() -> None:
    losses = [*noise(200), 30.0, *noise(5), 5.0, *noise(5)]
    assert [alarm.step for alarm in give_steps(LossSpike(), losses)] == [201, 207]


def test_a_falling_loss_does_not_hide_a_spike() -> None:
    losses = [2.5 + 3 * 0.95**count for count in range(60)]
    assert [alarm.step for alarm in give_steps(LossSpike(), [*losses, 6.0])] == [61]


def test_loss_spike_tells_a_bad_batch_from_a_bad_update() -> None:
    ordinary = noise(100, 1.0, 0.05)
    batch = give_steps(LossSpike(), [*noise(100), 6.0], [*ordinary, 9.0])[0]
    assert "within one step, after updates with ordinary gradients" in batch.evidence
    assert batch.remedy == "Look at the batch of step 101: the data changed, not the model."
    update = give_steps(LossSpike(), [*noise(100), 6.0], [*ordinary[:-1], 9.0, 9.0])[0]
    assert "unusual at step 100" in update.evidence
    assert "Clip" in update.remedy


def test_gradient_spike() -> None:
    norms = noise(200, 1.0, 0.1)
    assert give_steps(GradientSpike(), [3.0] * 250, noise(250, 1.0, 0.1)) == []
    assert give_steps(GradientSpike(), [3.0] * 250, [*norms, 3.2, *norms[:30]]) == [], "once, and without harm"
    assert give_steps(GradientSpike(), [3.0] * 250, [*norms, 2.9, 2.9, *norms[:30]]) == []
    alarms = give_steps(GradientSpike(), [3.0] * 250, [*norms, 3.2, *norms[:20], 3.3])
    assert [(alarm.step, alarm.severity) for alarm in alarms] == [(222, "warn")]
    assert "another was at step 201" in alarms[0].evidence
    assert "Make sure that gradients are clipped" in alarms[0].remedy
    assert give_steps(GradientSpike(), [3.0] * 300, [*norms, 3.2, *norms[:64], 3.2]) == [], "too far apart"


def test_gradient_spike_that_does_harm() -> None:
    norms, losses = noise(70, 1.0, 0.1), noise(70)
    alarms = give_steps(GradientSpike(), [*losses, 3.0, 3.0, 3.3], [*norms, 3.2, 1.0, 1.0])
    assert [alarm.step for alarm in alarms] == [73]
    assert "over the last 70 steps" in alarms[0].evidence
    assert "the loss rose to 3.3 from" in alarms[0].evidence
    assert give_steps(GradientSpike(), [*losses, *[3.0] * 6, 3.3], [*norms, 3.2, *[1.0] * 6]) == []
    assert give_steps(GradientSpike(), [*losses[:60], 3.0, 3.3], [*norms[:60], 3.2, 1.0]) == [], "60 steps are too few"


def test_unrecovered_spike() -> None:
    def severities(high: int, level: float = 6.5) -> list[tuple[int, str]]:
        alarms = give_steps(UnrecoveredSpike(), [*noise(200), *[level] * high, *noise(50)])
        return [(alarm.step, alarm.severity) for alarm in alarms]

    assert severities(4) == []
    assert severities(5) == [(205, "warn")]
    assert severities(100, level=5.9) == []
    assert {severity for _, severity in severities(64)} == {"warn"}
    assert severities(65)[-1] == (265, "fail")


def test_half_of_what_was_learned_counts_as_lost() -> None:
    learned = [5.6, 5.6, 5.6, 5.6, *noise(100, 2.5)]
    assert give_steps(UnrecoveredSpike(), [*learned, *[4.3] * 5])[0].step == 109
    assert give_steps(UnrecoveredSpike(), [*learned, *[3.9] * 5]) == []
    barely = [5.6, 5.6, 5.6, 5.6, *noise(100, 5.3)]
    assert give_steps(UnrecoveredSpike(), [*barely, *[5.5] * 20]) == []


# Layers ---------------------------------------------------------------------------------------------------------------


def test_layer_jump_names_the_weights_that_jumped() -> None:
    before = {"weight_rms": layers(0.1, count=5), "stream_rms": layers(1.0)}
    after = {"weight_rms": layers(0.1, 5.0, count=5), "stream_rms": [1.0, 1.0, 90.0, 91.0]}
    reports = give_samples(LayerJump(), [*[before] * 5, after, after, before])
    assert [[(alarm.severity, alarm.layer) for alarm in alarms] for alarms in reports] == [
        *[[]] * 5, [("fail", "blocks.2")], [("fail", "blocks.2")], [],
    ]  # fmt: skip
    assert (
        "Weights jumped at blocks.2: the RMS of the weights rose 50-fold by step 50, from 0.1 to 5"
        in reports[5][0].evidence
    )


def test_layer_jump_of_a_gain() -> None:
    before, after = {"gain_max": layers(1.0)}, {"gain_max": layers(1.0, 100.0)}
    assert give_samples(LayerJump(), [*[before] * 3, after])[-1][0].layer == "blocks.2.norm"


@pytest.mark.parametrize(("factor", "expected"), [(4.9, None), (5.1, "warn"), (19.0, "warn"), (21.0, "fail")])
def test_layer_jump_of_the_stream_is_the_first_blocks(factor: float, expected: str | None) -> None:
    before, after = {"stream_rms": layers(1.0, count=8)}, {"stream_rms": [*[1.0] * 5, *[factor] * 3]}
    history = History(facts=facts(8))
    history.steps.extend(Step(step, 3.0 if step < 35 else 3.2, 1.0, 1e-3) for step in range(1, 51))
    reports = give_samples(LayerJump(), [*[before] * 4, after, after], history)
    assert first(reports) == (5 if expected else None)
    if expected:
        assert [(alarm.severity, alarm.layer) for alarm in reports[-1]] == [(expected, "blocks.5")]


def test_layer_jump_needs_others_that_did_not() -> None:
    before, after = {"weight_rms": layers(0.1, count=5)}, {"weight_rms": layers(1.0, count=5)}
    assert first(give_samples(LayerJump(), [*[before] * 5, after, after])) is None


def test_slow_growth_and_zero_start_are_no_jump() -> None:
    slow = [{"weight_rms": layers(0.1, 0.1 * 1.5**count, count=5)} for count in range(20)]
    assert first(give_samples(LayerJump(), slow)) is None
    start = [{"weight_rms": layers(0.1, 1e-3 * count, count=5)} for count in range(20)]
    assert first(give_samples(LayerJump(), start)) is None


def test_a_silent_block_and_silent_parts() -> None:
    alive = {"branch_ratio": layers(0.3), "attention_ratio": layers(0.2), "feed_forward_ratio": layers(0.2)}
    for signal, layer in (
        ("branch_ratio", "blocks.2"),
        ("attention_ratio", "blocks.2.attention"),
        ("feed_forward_ratio", "blocks.2.feed_forward"),
    ):
        dead = {**alive, signal: layers(0.3, 0.0)}
        reports = give_samples(BranchSilent(), [alive, alive, dead, dead, dead])
        assert first(reports) == 4, "alive before: three samples"
        assert [(alarm.severity, alarm.layer) for alarm in reports[4]] == [("fail", layer)]
        assert first(give_samples(BranchSilent(), [*[dead] * 2, alive])) is None, "zero-initialized: it learns at once"
        assert first(give_samples(BranchSilent(), [dead] * 9)) == 3, "0 and nothing but 0"
        tiny = {**alive, signal: layers(0.3, 1e-7)}
        assert first(give_samples(BranchSilent(), [*[tiny] * 5, alive])) is None, "it gets time"
        assert first(give_samples(BranchSilent(), [tiny] * 9)) == 6
        assert first(give_samples(BranchSilent(), [dead, *[tiny] * 8])) == 6


def test_a_weak_block_is_a_warning() -> None:
    reports = give_samples(BranchSilent(), [{"branch_ratio": layers(0.3, 0.009)}] * 8)
    assert first(reports) == 6
    assert {(alarm.severity, alarm.layer) for alarm in reports[-1]} == {("warn", "blocks.2")}
    assert first(give_samples(BranchSilent(), [{"branch_ratio": layers(0.3, 0.011)}] * 8)) is None


def test_a_stream_of_zeros_is_blamed_on_the_first_block() -> None:
    alive = {"stream_rms": layers(1.0), "branch_ratio": layers(0.3)}
    dead = {"stream_rms": [1.0, 0.0, 0.0, 0.0], "branch_ratio": [0.3, 1.0, None, None]}
    assert give_samples(BranchSilent(), [alive, dead, dead, dead])[-1][0].layer == "blocks.1"


def test_gains() -> None:
    drifted = [{"gain_ratio": layers(1.0, ratio), "gain_max": layers(1.0)} for ratio in (1.0, 2.0, *[11.0] * 4)]
    reports = give_samples(GainDrift(), drifted)
    assert first(reports) == 4
    assert [(alarm.severity, alarm.layer) for alarm in reports[4]] == [("warn", "blocks.2.norm")]
    short = [{"gain_ratio": layers(1.0, ratio)} for ratio in (1.0, *[9.9] * 9)]
    assert first(give_samples(GainDrift(), short)) is None
    pretrained = [{"gain_ratio": layers(1.0, 20.0)}] * 9
    assert first(give_samples(GainDrift(), pretrained)) is None, "it has not drifted in this run"
    assert first(give_samples(GainDrift(), [{"gain_small": layers(0.0, 0.6)}] * 5)) == 3


def test_gains_of_zero() -> None:
    zero = {"gain_max": layers(1.0, 0.0), "gain_small": layers(0.0, 1.0)}
    learning = give_samples(GainDrift(), [zero] * 4)
    assert first(learning) == 3
    assert [(alarm.severity, alarm.layer) for alarm in learning[3]] == [("fail", "blocks.2.norm")]
    frozen = tuple(NormFacts(f"blocks.{index}.norm", "RMSNorm", 1e-6, index, frozen=True) for index in range(BLOCKS))
    history = History(facts=facts(norms=frozen))
    reports = give_samples(GainDrift(), [zero], history)
    assert [(alarm.severity, alarm.layer) for alarm in reports[0]] == [("fail", "blocks.2.norm")]
    assert "requires_grad" in reports[0][0].remedy


# Optimizer ------------------------------------------------------------------------------------------------------------


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
        for number, loss in enumerate(losses, start=1):
            history.steps.append(Step(number, loss, 1.0, 1e-3))
            assert list(rule.on_step(history, history.steps[-1])) == []
        reports = give_samples(rule, [rates(0.6, 0.1), rates(0.12, 0.15), rates(0.06, 0.25)], history)
        assert [alarm.severity for alarm in reports[-1]] == [severity]


def test_harm_is_a_loss_above_its_start() -> None:
    history, rule = History(facts=facts()), LearningRate()
    for number in range(1, 20):  # too few to tell whether it has stopped falling
        history.steps.append(Step(number, 5.0 + 0.1 * number, 1.0, 1e-3))
        assert list(rule.on_step(history, history.steps[-1])) == []
    reports = give_samples(rule, [rates(0.6, 0.1), rates(0.12, 0.25)], history)
    assert [alarm.severity for alarm in reports[-1]] == ["fail"]
    assert "is not below its start" in reports[-1][0].evidence


def test_a_rate_is_judged_by_the_quiet_groups() -> None:
    loud: list[Signals] = [
        {"update_ratio": [0.3] * 8 + [0.01] * 2, "weight_rms": [0.1 * 2**count] * 8 + [0.1] * 2} for count in range(9)
    ]
    history = History(facts=facts(groups=tuple(f"group {index}" for index in range(10))))
    assert first(give_samples(LearningRate(), loud, history)) is None


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


# Depth ----------------------------------------------------------------------------------------------------------------


def over_depth(ratio: float, blocks: int, linear: bool = False) -> list[float]:
    """Growth from 1 to `ratio`: exponential, or with a variance that grows linearly."""
    if linear:
        return [math.sqrt(1 + (ratio**2 - 1) * index / (blocks - 1)) for index in range(blocks)]
    return [ratio ** (index / (blocks - 1)) for index in range(blocks)]


@pytest.mark.parametrize(
    ("ratio", "blocks", "linear", "expected"),
    [
        (99.0, 24, False, None),  # not enough in all
        (101.0, 24, False, "warn"),
        (1e5, 24, True, None),  # as pre-norm does it
        (2e4, 24, False, "fail"),
        (2e4, 60, False, "warn"),  # exponent 0.165
        (101.0, 100, False, None),  # exponent 0.046
    ],
)
def test_depth_growth(ratio: float, blocks: int, linear: bool, expected: str | None) -> None:
    values = over_depth(ratio, blocks, linear)
    for signals in ({"stream_rms": values}, {"stream_grad": values[::-1]}, {"stream_grad": [1e-9 * v for v in values]}):
        if linear and "stream_grad" in signals:
            continue
        reports = give_samples(DepthGrowth(), [signals] * 5, History(facts=facts(blocks), placement="pre"))
        assert first(reports) == (3 if expected else None)
        if expected:
            assert [(alarm.severity, alarm.layer) for alarm in reports[-1]] == [(expected, None)]
            assert "pre-norm" in reports[-1][0].evidence


def test_no_norm() -> None:
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
    assert report(1e6, placement=None) == [], "the facts tell of norms in the blocks"


def test_no_norm_explains_an_overflow() -> None:
    history = History(facts=facts(norms=(NormFacts("final", "RMSNorm"),)))
    history.nonfinite = NonFinite(1, "forward", "blocks.3.attention", "nan")
    history.steps.append(Step(1, math.nan, math.nan, 1e-3))
    alarms = Judge().judge_steps(history, list(history.steps))
    assert [alarm.rule for alarm in alarms] == ["no-norm", "nonfinite"]
    assert "blocks.3.attention" in alarms[0].evidence


def post(blocks: int, ratio: float, first_rate: float, placement: str = "post") -> list[Alarm]:
    history, rule = History(facts=facts(blocks), placement=placement), PostNormDepth()
    for step in range(1, 21):
        history.steps.append(Step(step, 5.0, 1.0, first_rate if step < 10 else 1e-3))
        assert list(rule.on_step(history, history.steps[-1])) == []
    return give_samples(rule, [{"stream_grad": [ratio, *[1.0] * (blocks - 1)]}] * 3, history)[-1]


def test_post_norm_depth() -> None:
    (alarm,) = post(24, 0.0099, 1e-3)
    assert (alarm.severity, alarm.layer) == ("fail", None)
    assert alarm.evidence.startswith("Post-norm with 24 blocks: ")
    assert "without warm-up, at a rate of 0.001" in alarm.evidence
    assert "101-fold" in alarm.evidence
    (warmed,) = post(24, 0.0099, 1e-4)
    assert "with a warm-up" in warmed.evidence
    assert post(24, 0.011, 1e-3) == []
    assert post(11, 0.0099, 1e-3) == []
    assert post(24, 0.0099, 1e-3, "pre") == []


def test_logz() -> None:
    drifting = [{"logz_mean": [10.8 + 3.0 * count]} for count in range(20)]
    reports = give_samples(LogZ(), drifting)
    assert first(reports) == 9, "more than 10 away from step 40 on, five samples and 50 steps long"
    assert reports[9][0].severity == "warn"
    assert first(give_samples(LogZ(), [{"logz_mean": [10.8]}, *[{"logz_mean": [30.0]}] * 9])) == 6
    settled = give_samples(LogZ(), [{"logz_mean": [10.8]}, *[{"logz_mean": [30.0]}] * 20])
    assert settled[-1] == [], "it has stopped drifting"
    assert first(give_samples(LogZ(), [{"logz_mean": [30.0]}] * 20)) is None


# Non-finite values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "placement", "evidence", "remedy"),
    [
        (NonFinite(3, "forward", "blocks.1.feed_forward", "inf"), "pre", "infinity", "bf16"),
        (NonFinite(3, "forward", "embedding", "nan"), "pre", "NaN", "batch of step 3"),
        (NonFinite(3, "forward", "blocks.1", "nan"), "pre", "NaN", "0/0"),
        (NonFinite(3, "loss", None, "nan"), "pre", "in the loss", "labels"),
        (NonFinite(3, "backward", "blocks.1.w", "nan"), "pre", "gradient of blocks.1.w", "root"),
        (NonFinite(3, "optimizer", "blocks.1.w", "inf"), "pre", "weights of blocks.1.w", "ε"),
        (NonFinite(3, "elsewhere", "{layer}", "nan"), "pre", "in {layer}", ""),
    ],
)
def test_nonfinite(found: NonFinite, placement: str, evidence: str, remedy: str) -> None:
    history = History(facts=facts(), placement=placement, nonfinite=found)
    history.steps.append(Step(2, 3.0, 1.0, 1e-3))
    assert list(NonFiniteRule().on_step(history, history.steps[-1])) == []
    history.steps.append(Step(3, math.nan, 1.0, 1e-3))
    (alarm,) = NonFiniteRule().on_step(history, history.steps[-1])
    assert (alarm.step, alarm.severity, alarm.layer) == (3, "fail", found.layer)
    assert evidence in alarm.evidence
    assert remedy in alarm.remedy


# All rules ------------------------------------------------------------------------------------------------------------

JUNK = [None, math.nan, math.inf, -math.inf, 0.0, -1.0, 1e308, 5e-324]


def test_no_rule_stumbles_over_junk() -> None:
    """The judge turns an error of a rule into a warning, and here warnings are errors."""
    generator = random.Random(1)
    judge, history = Judge(), History(facts=facts(12))
    sizes = {"run": 1, "block": 12, "norm": 12, "group": 13}
    for step in range(1, 400):
        numbers = [generator.choice([math.nan, math.inf, 0.0, -1.0, 1e308, 3.0]) for _ in range(3)]
        history.steps.append(Step(step, *numbers))
        judge.judge_steps(history, [history.steps[-1]])
        signals = {
            name: [generator.choice(JUNK) for _ in range(sizes[signal.axis])]
            for name, signal in SIGNALS.items()
            if generator.random() < 0.9
        }
        history.samples.append(Sample(step, signals))
        history.placement = generator.choice([None, "pre", "post", "both", "none"])
        judge.judge_sample(history)
    assert len(judge.rules) == len(default_rules())


def test_rules_do_without_facts() -> None:
    judge, history = Judge(), History()
    for step in range(1, 100):
        history.steps.append(Step(step, 3.0 - 0.01 * step, math.nan, math.nan))
        assert judge.judge_steps(history, [history.steps[-1]]) == []
        history.samples.append(Sample(step, {name: [1e9] * 3 for name in SIGNALS}))
        judge.judge_sample(history)
    assert len(judge.rules) == len(default_rules())


def test_rules_are_documented() -> None:
    rules = default_rules()
    assert len({rule.name for rule in rules}) == len(rules) == 23
    for rule in rules:
        module = __import__(type(rule).__module__, fromlist=["_"])
        assert module.__doc__.startswith(f"{rule.name}: ")
        assert "Persistence" in module.__doc__ or rule.name == "learning-rate"
        assert rule.source
        assert ": ours" not in rule.source
        assert set(rule.explains) <= {other.name for other in rules}
