"""Rules that compare a signal with thresholds, on synthetic histories; and properties of all rules."""

from __future__ import annotations

import math
import random

import pytest
from helpers.histories import BLOCKS, Signals, facts, first, give_samples, last, layers

from omninorm.monitor import History, Sample, Step
from omninorm.monitor.alarms import Judge
from omninorm.monitor.rules import Rule, default_rules
from omninorm.monitor.rules.adam_eps import AdamEps
from omninorm.monitor.rules.adam_underestimation import AdamUnderestimation
from omninorm.monitor.rules.attention_entropy import AttentionEntropy
from omninorm.monitor.rules.attention_logits import AttentionLogits
from omninorm.monitor.rules.base import Threshold
from omninorm.monitor.rules.dead_units import DeadUnits
from omninorm.monitor.rules.headroom import Headroom
from omninorm.monitor.rules.massive_activation import MassiveActivation
from omninorm.monitor.rules.saturation import Saturation
from omninorm.record.signals import SIGNALS

pytestmark = pytest.mark.usefixtures("words")

# Rules that compare a signal with thresholds --------------------------------------------------------------------------


# rule, signal, ordinary value, a value that warns, one just short of it, one that fails (None: the rule never fails),
# one that warns and is just short of failing, samples until it is reported, layer
THRESHOLDS = [
    (AttentionEntropy, "attention_entropy", 0.8, 0.029, 0.031, None, 0.001, 3, "blocks.2"),
    (AttentionLogits, "attention_logit", 10.0, 1.01e3, 0.99e3, 1.01e4, 0.99e4, 2, "blocks.2"),
    (AdamUnderestimation, "adam_ratio", 1.0, 2.4, 2.2, None, 100.0, 5, "blocks.2"),
    (DeadUnits, "dead_units", 0.0, 0.51, 0.49, None, 1.0, 3, "blocks.2"),
    (Saturation, "saturation", 0.1, 0.51, 0.49, None, 1.0, 3, "blocks.2.norm"),
]


@pytest.mark.parametrize(
    ("kind", "signal", "ordinary", "warns", "short", "fails", "almost", "samples", "layer"), THRESHOLDS
)
def test_value_beyond_threshold_is_reported_after_its_persistence(
    kind: type[Rule], signal: str, ordinary: float, warns: float, short: float,
    fails: float | None, almost: float, samples: int, layer: str,
) -> None:  # fmt: skip
    count = BLOCKS + (SIGNALS[signal].axis == "group")
    faulty = {signal: layers(ordinary, warns, count=count)}
    reports = give_samples(kind(), [faulty] * 8)
    # The first sample is at step 1, so three samples span 19 of 20 steps, and five span 39 of 50.
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
def test_healthy_sample_resets_persistence_and_missing_sample_does_not(row: tuple) -> None:
    kind, signal, ordinary, warns, *_ = row
    count = BLOCKS + (SIGNALS[signal].axis == "group")
    faulty, healthy = {signal: layers(ordinary, warns, count=count)}, {signal: layers(ordinary, count=count)}
    gap = {signal: [None] * count}
    assert first(give_samples(kind(), [faulty, healthy] * 6)) is None
    assert first(give_samples(kind(), [faulty, gap, faulty, gap, *[faulty] * 4])) is not None


def test_massive_activation_needs_a_large_maximum_and_a_large_ratio() -> None:
    def signals(largest: float, middle: float | None) -> Signals:
        return {"stream_max": layers(1.0, largest), "stream_median": layers(0.5, middle)}

    assert first(give_samples(MassiveActivation(), [signals(101.0, 0.1)] * 5)) == 3
    assert first(give_samples(MassiveActivation(), [signals(99.0, 0.001)] * 5)) is None
    assert first(give_samples(MassiveActivation(), [signals(101.0, 0.11)] * 5)) is None
    assert first(give_samples(MassiveActivation(), [{"stream_max": layers(1.0, 1e9)}] * 5)) is None


def test_headroom_is_reported_in_fp16_only() -> None:
    signals = [{"stream_max": layers(1.0, 7000.0)}]
    for dtype, expected in (("float16", ["warn"]), ("bfloat16", []), (None, [])):
        history = History(facts=facts(), dtype=dtype)
        assert [alarm.severity for alarm in give_samples(Headroom(), signals, history)[0]] == expected
    history = History(facts=facts(), dtype="float16")
    assert give_samples(Headroom(), [{"stream_max": layers(1.0, 65504.0)}], history)[0][0].severity == "fail"


def test_worst_layer_is_reported_first() -> None:
    reports = give_samples(AttentionLogits(), [{"attention_logit": [2e3, 5e4, 3e3, 10.0]}] * 2)
    assert [(alarm.layer, alarm.severity) for alarm in reports[-1]] == [
        ("blocks.1", "fail"), ("blocks.2", "warn"), ("blocks.0", "warn"),
    ]  # fmt: skip
    reports = give_samples(AttentionEntropy(), [{"attention_entropy": [0.02, 0.5, 0.01, 0.5]}] * 4)
    assert [alarm.layer for alarm in reports[-1]] == ["blocks.2", "blocks.0"]


def test_growing_logits_are_reported_before_the_limits() -> None:
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


@pytest.mark.parametrize("kind", [AttentionEntropy, AdamUnderestimation, DeadUnits, Saturation])
def test_value_equal_to_the_threshold_raises_no_alarm(kind: type[Threshold]) -> None:
    limit = kind.warn
    assert limit is not None
    ordinary = 1.0 if kind.below else 0.0
    beyond = math.nextafter(limit, -math.inf if kind.below else math.inf)
    assert first(give_samples(kind(), [{kind.signal: layers(ordinary, limit, count=5)}] * 9)) is None
    assert first(give_samples(kind(), [{kind.signal: layers(ordinary, beyond, count=5)}] * 9)) is not None


def test_missing_layer_does_not_hide_the_next_one() -> None:
    assert last(AttentionLogits(), [{"attention_logit": [None, 2e4, 10.0, 2e3]}] * 2) == [
        ("fail", "blocks.1"), ("warn", "blocks.3"),
    ]  # fmt: skip


def test_unknown_adam_eps_is_reported_and_eps_of_zero_is_not() -> None:
    history = History(facts=facts(adam_eps=None))
    assert last(AdamEps(), [{"adam_eps_ratio": [0.5] * 5}] * 5, history) == [("fail", "blocks.0.w")]
    assert last(AdamEps(), [{"adam_eps_ratio": [0.5] * 5}] * 5, History(facts=facts(adam_eps=0.0))) == []


def test_logit_growth_needs_three_rises() -> None:
    def first_report(*values: float) -> int | None:
        return first(give_samples(AttentionLogits(), [{"attention_logit": layers(10.0, value)} for value in values]))

    assert first_report(10.0, 150.0, 160.0) is None, "two rises"
    assert first_report(10.0, 10.0, 150.0, 160.0, 170.0) is None, "one sample did not rise"
    assert first_report(0.0, 10.0, 150.0, 160.0, 170.0) is None, "growth from 0 is undefined"
    assert first_report(0.5, 10.0, 150.0, 160.0, 170.0) == 4
    assert first_report(40.0, 80.0, 110.0, 119.0, 120.0) is None, "exactly 3-fold"
    assert first_report(1e3, 1e3) is None


def test_massive_activation_is_reported_when_the_median_is_zero() -> None:
    massive = [{"stream_max": layers(1.0, 101.0), "stream_median": layers(0.5, 0.0)}] * 5
    assert last(MassiveActivation(), massive) == [("warn", "blocks.2")]


# Texts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "signal", "values", "cause"),
    [
        (AdamEps(), "adam_eps_ratio", [0.5] * 5, "Adam's ε too large"),
        (AttentionLogits(), "attention_logit", [2e4] * 4, "Attention logits too large"),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_evidence_begins_with_the_cause(rule: Rule, signal: str, values: list[float], cause: str) -> None:
    assert give_samples(rule, [{signal: values}] * 5)[-1][0].evidence.split(":")[0] == cause


# All rules ------------------------------------------------------------------------------------------------------------


JUNK = [None, math.nan, math.inf, -math.inf, 0.0, -1.0, 1e308, 5e-324]


def test_no_rule_fails_on_junk() -> None:
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


def test_no_rule_needs_facts_about_the_model() -> None:
    judge, history = Judge(), History()
    for step in range(1, 100):
        history.steps.append(Step(step, 3.0 - 0.01 * step, math.nan, math.nan))
        assert judge.judge_steps(history, [history.steps[-1]]) == []
        history.samples.append(Sample(step, {name: [1e9] * 3 for name in SIGNALS}))
        judge.judge_sample(history)
    assert len(judge.rules) == len(default_rules())


def test_every_rule_documents_its_persistence_and_source() -> None:
    rules = default_rules()
    assert len({rule.name for rule in rules}) == len(rules)
    for rule in rules:
        module = __import__(type(rule).__module__, fromlist=["_"])
        assert module.__doc__.startswith(f"{rule.name}: ")
        assert "persistence" in module.__doc__.lower() or rule.name == "learning-rate"
        assert rule.source
        assert ": ours" not in rule.source
        assert set(rule.explains) <= {"optimizer-coverage", *(other.name for other in rules)}
