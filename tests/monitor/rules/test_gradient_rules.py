"""gradient-underflow, gradient-noise and gradients that are set to 0, on synthetic measurements."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers.histories import facts, numbers_in

from omninorm.monitor import Alarm, History, Sample, Step
from omninorm.monitor.checks.facts import SampleChecks, Setup, StepChecks
from omninorm.monitor.checks.grids import Grid
from omninorm.monitor.rules import Rule
from omninorm.monitor.rules.gradient_noise import GradientNoise
from omninorm.monitor.rules.gradient_underflow import GradientUnderflow
from omninorm.monitor.rules.no_gradient import NoGradientRule

pytestmark = pytest.mark.usefixtures("words")


def grids(zeros: Sequence[float], unevenness: float = 20.0) -> SampleChecks:
    return SampleChecks(grids=tuple(Grid(f"blocks.{at}.w", share, unevenness) for at, share in enumerate(zeros)))


def give(rule: Rule, checks: Sequence[SampleChecks]) -> list[list[Alarm]]:
    """Return what the rule reports at each sample, 10 steps apart."""
    history, reports = History(facts=facts()), []
    for count, each in enumerate(checks):
        history.samples.append(Sample(max(10 * count, 1), {}, checks=each))
        reports.append(list(rule.on_sample(history, history.samples[-1])))
    return reports


def severities(reports: list[list[Alarm]]) -> str:
    return "".join(alarms[0].severity[0] if alarms else "-" for alarms in reports)


@pytest.mark.parametrize(
    ("zeros", "expected"),
    [
        ((0.11, 0.3, 0.0, 0.0), "---w"),
        ((0.09, 0.3, 0.0, 0.0), "----"),
        ((1.0, 0.3, 0.0, 0.0), "---w"),
        ((1.0, 1.0, 1.0, 1.0), "----"),  # no gradient at all: another rule
        ((0.5, 0.0, 0.0, 0.0), "----"),
        ((0.5,), "----"),
        ((), "----"),
    ],
)
def test_half_of_the_matrices_with_zeros_are_underflow(zeros: Sequence[float], expected: str) -> None:
    assert severities(give(GradientUnderflow(), [grids(zeros)] * 4)) == expected


def test_matrices_whose_whole_gradient_is_0_are_underflow_if_others_are_not() -> None:
    history = History(facts=facts())
    rule, reports = GradientUnderflow(), []
    for count in range(4):
        sample = Sample(10 * count, {"grad_norm": [0.0, 0.0, 0.0, 0.0, 0.3]}, checks=grids((1.0, 1.0, 1.0)))
        history.samples.append(sample)
        reports.append(list(rule.on_sample(history, sample)))
    assert severities(reports) == "--ww"
    assert numbers_in(reports[-1][0].evidence) == pytest.approx([3, 3, 10, 0, 100])


def test_underflow_names_the_worst_matrix_and_the_scale() -> None:
    checks = SampleChecks(grids=grids((0.11, 0.3, 1.0, 0.0)).grids, scale=1024.0)
    (alarm,) = give(GradientUnderflow(), [checks] * 4)[-1]
    assert "blocks.1.w" in alarm.evidence
    assert numbers_in(alarm.evidence) == pytest.approx([3, 4, 10, 0, 30])
    assert 1024 in numbers_in(alarm.remedy)


@pytest.mark.parametrize(
    ("dtype", "autocast", "scale", "underflow"),
    [
        ("float32", False, None, False), (None, None, None, False), ("float16", False, None, True),
        ("bfloat16", False, None, True), ("float32", True, None, True), ("float32", False, 8.0, True),
    ],
)  # fmt: skip
def test_only_16_bits_are_called_underflow(
    dtype: str | None, autocast: bool | None, scale: float | None, underflow: bool
) -> None:
    history, rule = History(facts=facts(), dtype=dtype), GradientUnderflow()
    history.steps.append(Step(1, 3.0, 1.0, 1e-3, StepChecks(setup=Setup(autocast=autocast))))
    checks = SampleChecks(grids=grids((0.3, 0.3)).grids, scale=scale)
    for count in range(4):
        history.samples.append(Sample(10 * count, {}, checks=checks))
        alarms = list(rule.on_sample(history, history.samples[-1]))
    assert alarms[0].evidence.startswith("Gradients underflow" if underflow else "Gradients have holes")
    assert ("fp16" in alarms[0].remedy) is underflow


def test_gradients_that_become_random_fail_at_the_second_sample() -> None:
    ordered, random = grids([0.0] * 4), grids([0.0] * 4, 1.1)
    reports = give(GradientNoise(), [ordered] * 4 + [random] * 3)
    assert severities(reports) == "-----ff"
    assert numbers_in(reports[-1][0].evidence) == pytest.approx([1.1, 20])


@pytest.mark.parametrize(
    ("before", "after"),
    # Still uneven; never was; noise from the start, as in private training; elements of equal size, such as signs.
    [(20.0, 1.7), (4.0, 1.1), (1.0, 1.0), (20.0, 0.3)],
)
def test_other_gradients_are_not_noise(before: float, after: float) -> None:
    checks = [grids([0.0] * 4, before)] * 5 + [grids([0.0] * 4, after)] * 5
    assert severities(give(GradientNoise(), checks)) == "-" * 10


def test_few_matrices_are_no_evidence_of_noise() -> None:
    checks = [grids([0.0, 0.0, 1.0])] * 5 + [grids([0.0, 0.0, 1.0], 1.0)] * 5
    assert severities(give(GradientNoise(), checks)) == "-" * 10


def test_gradients_of_some_blocks_set_to_0_are_reported_at_the_second_sample() -> None:
    zeroed = SampleChecks(zeroed=("blocks.1", "blocks.2"))
    reports = give(NoGradientRule(), [SampleChecks(), zeroed, SampleChecks(), zeroed, zeroed])
    assert severities(reports) == "----w"
    assert reports[-1][0].layer == "blocks.2"
    assert "blocks.1 and blocks.2" in reports[-1][0].evidence
    others = [SampleChecks(zeroed=("blocks.1",)), SampleChecks(zeroed=("blocks.2",))]
    assert severities(give(NoGradientRule(), others * 3)) == "-" * 6, "a part that trains now and then"
