"""Rules about exact facts: what they report about synthetic steps and samples, and the numbers in their texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from helpers.histories import facts, numbers_in

from omninorm.monitor import Alarm, History, Sample, Step
from omninorm.monitor.alarms import Judge
from omninorm.monitor.checks.facts import Lost, NoGradient, Replica, SampleChecks, Setup, Stale, StepChecks
from omninorm.monitor.rules import Rule
from omninorm.monitor.rules.gradient_clipped import GradientClipped
from omninorm.monitor.rules.gradients_not_cleared import GradientsNotCleared
from omninorm.monitor.rules.identical_batches import IdenticalBatches
from omninorm.monitor.rules.learning_rate_zero import LearningRateZero
from omninorm.monitor.rules.no_gradient import NoGradientRule
from omninorm.monitor.rules.replicas_differ import ReplicasDiffer
from omninorm.monitor.rules.stale_parameters import StaleParameters, common
from omninorm.monitor.rules.steps_skipped import StepsSkipped
from omninorm.monitor.rules.updates_lost import UpdatesLost

pytestmark = pytest.mark.usefixtures("words")

GOOD = StepChecks(optimizer=True, received=True, stepped=True, rates=(1e-3,))
NONE = replace(GOOD, received=False)


def judge(
    rule: Rule, steps: Iterable[StepChecks | None], sample: SampleChecks | None = None, every: int = 10, **known: Any
) -> list[Alarm]:
    """Return the rule's reports at the last step, or at the last sample if there are samples, all alike."""
    history, reports = History(facts=facts(**known)), list[Alarm]()
    for number, checks in enumerate(steps, start=1):
        history.steps.append(Step(number, 3.0, 1.0, 1e-3, checks))
        reports = list(rule.on_step(history, history.steps[-1]))
        if sample is not None and (number % every == 0 or number == 1):
            history.samples.append(Sample(number, {}, checks=sample))
            reports = list(rule.on_sample(history, history.samples[-1]))
    assert {(alarm.rule, alarm.source) for alarm in reports} <= {(rule.name, rule.source)}
    return reports


def severities(rule: type[Rule], steps: Sequence[StepChecks | None], sample: SampleChecks | None = None) -> list[str]:
    """Return one letter per step: w(arn), f(ail) or a dash."""
    every = 1
    return [
        "".join(alarm.severity[0] for alarm in judge(rule(), steps[: end + 1], sample, every)) or "-"
        for end in range(len(steps))
    ]


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "steps", "severity"),
    [
        *(("blocks", 2, "f"), ("part", 2, "f"), ("most", 2, "f"), ("stack", 5, "w"), ("last blocks", 5, "w")),
        *(("outside", 5, "w"), ("leaf", 20, "w"), ("zero", 10, "w")),
        ("skipped", 10, "f"),
    ],
)
def test_modules_without_gradient_are_reported_after_their_persistence(kind: str, steps: int, severity: str) -> None:
    bad = replace(GOOD, no_gradient=(NoGradient("blocks.1", kind, ("blocks.1",), 8),))
    assert severities(NoGradientRule, [bad] * steps) == ["-"] * (steps - 1) + [severity]
    assert severities(NoGradientRule, [*[bad] * (steps - 1), GOOD, bad])[-1] == "-"
    unknown = replace(bad, optimizer=False)
    assert severities(NoGradientRule, [unknown] * 10 * steps).index(severity) == 10 * steps - 1


def test_block_that_is_skipped_after_the_first_step_is_reported_later() -> None:
    bad = replace(GOOD, no_gradient=(NoGradient("blocks.1", "skipped", ("blocks.1",), 8),))
    assert severities(NoGradientRule, [GOOD, *[bad] * 30]) == ["-"] * 30 + ["f"]


def test_steps_without_any_gradient_are_reported() -> None:
    assert severities(NoGradientRule, [GOOD, NONE, NONE, NONE, GOOD]) == ["-", "-", "-", "f", "-"]
    assert severities(NoGradientRule, [replace(NONE, optimizer=False)] * 3) == ["-", "-", "w"]


def test_uncleared_gradients_are_reported_at_the_second_step() -> None:
    kept = replace(GOOD, kept=0.3)
    assert severities(GradientsNotCleared, [GOOD, kept, kept, GOOD, kept]) == ["-", "-", "f", "-", "-"]


def rates(*values: float) -> list[StepChecks]:
    return [replace(GOOD, rates=(value, value / 2)) for value in values]


@pytest.mark.parametrize(
    ("before", "warns", "fails"),
    [
        ([], 3, 20),
        ([1e-3] * 5, 2, 10),
        ([2e-4, 1e-3, 1e-3], 2, 10),
        ([1e-3, 8e-4, 6e-4, 4e-4, 2e-4], 20, None),  # linear
        ([1e-3, 5e-4 * (1 + math.cos(0.8 * math.pi)), 5e-4 * (1 + math.cos(0.9 * math.pi))], 20, None),  # cosine
        ([1e-3, 5e-5, 4.9e-5], 20, None),  # small
        ([1e-3, 9e-4, 8e-4], 2, 10),
    ],
)
def test_learning_rate_zero_depends_on_the_rates_before(before: list[float], warns: int, fails: int | None) -> None:
    found = severities(LearningRateZero, rates(*before, *[0.0] * 25))[len(before) :]
    assert [found.index("w") + 1, found.index("f") + 1 if "f" in found else None] == [warns, fails]


def test_other_steps_do_not_count_for_the_learning_rate() -> None:
    zero, some_zero = rates(0.0)[0], replace(GOOD, rates=(0.0, 1e-3))
    assert set(severities(LearningRateZero, [replace(zero, stepped=False)] * 30 + [some_zero] * 30)) == {"-"}
    assert set(severities(LearningRateZero, [replace(GOOD, rates=())] * 30)) == {"-"}


LOST = Lost(1, "bfloat16", (0.97, 0.95, None, 0.4, 0.91), 1.0)


@pytest.mark.parametrize(
    ("groups", "gains", "expected"),
    [
        ((0.91, 0.9, 0.2), None, ["fail"]),
        ((0.91, 0.89, 0.2), 1.0, ["warn"]),
        ((0.5, 0.5, 0.5), 0.91, ["warn"]),
        ((0.5, 0.5, 0.5), 0.89, []),
        ((None, None), None, []),
    ],
)
def test_lost_updates_are_judged_by_the_median_group(
    groups: tuple[float | None, ...], gains: float | None, expected: list[str]
) -> None:
    sample = SampleChecks(lost=Lost(1, "bfloat16", groups, gains))
    assert [alarm.severity for alarm in judge(UpdatesLost(), [GOOD] * 20, sample)] == expected
    assert judge(UpdatesLost(), [GOOD] * 14, sample, every=14) == []


def test_updates_that_are_small_on_purpose_or_skipped_do_not_count() -> None:
    sample = SampleChecks(lost=LOST)
    warm_up = rates(*(1e-3 * step / 40 for step in range(1, 21)))
    assert [alarm.severity for alarm in judge(UpdatesLost(), warm_up, sample)] == ["fail"]  # mean 0.53 of the last
    steep = rates(*(1e-3 * step**2 for step in range(1, 21)))
    assert judge(UpdatesLost(), steep, sample) == []
    late = [*rates(1e-3), *rates(*[9e-5] * 19)]
    assert judge(UpdatesLost(), late, sample) == []
    skipped = [replace(GOOD, overflowed="w")] * 10 + [GOOD] * 10
    assert judge(UpdatesLost(), skipped, sample) == []
    assert judge(UpdatesLost(), rates(*[0.0] * 20), sample) == []


SKIPPED = replace(GOOD, scaler=True, stepped=False, overflowed="blocks.1.w")


def test_skipped_steps_are_reported_later_in_the_search_for_a_scale() -> None:
    found = severities(StepsSkipped, [SKIPPED] * 20, SampleChecks())
    assert found == ["-"] * 12 + ["w"] * 7 + ["f"]
    found = severities(StepsSkipped, [GOOD, *[SKIPPED] * 20], SampleChecks())
    assert found == ["-"] * 3 + ["w"] * 17 + ["f"]
    assert set(severities(StepsSkipped, [GOOD, SKIPPED, SKIPPED] * 9, SampleChecks())) == {"-"}


def test_missing_optimizer_steps_are_reported_beyond_the_usual_pause() -> None:
    paused = replace(GOOD, stepped=False, rates=())
    found = severities(StepsSkipped, [paused] * 100, SampleChecks())
    assert found == ["-"] * 19 + ["w"] * 80 + ["f"]
    accumulates = [*[paused] * 7, GOOD] * 2
    assert severities(StepsSkipped, [*accumulates, *[paused] * 28], SampleChecks()) == ["-"] * 43 + ["w"]
    assert set(severities(StepsSkipped, [replace(paused, moved=True)] * 30, SampleChecks())) == {"-"}
    assert set(severities(StepsSkipped, [replace(paused, optimizer=False)] * 30, SampleChecks())) == {"-"}


def test_weights_that_change_without_the_optimizers_are_reported() -> None:
    moved = replace(GOOD, stepped=False, moved=True)
    assert severities(StaleParameters, [GOOD, *[moved] * 5, GOOD]) == [*"-----", "w", "-"]


@pytest.mark.parametrize(
    ("stale", "severity", "layer", "evidence"),
    [
        (Stale(replaced=("a.b.w", "a.b.v")), "warn", "a.b", [2]),
        (Stale(added=("a.b.w", "a.c.w"), removed=("d.w",)), "warn", None, [2, 1]),
        (Stale(replaced=("a.b.w",), unheld=("a.b.w",), foreign=1), "fail", "a.b.w", [1]),
        (Stale(unheld=("a.b.w", "a.c.w"), foreign=2), "fail", "a", [2]),
    ],
)
def test_changed_parameters_are_reported(stale: Stale, severity: str, layer: str | None, evidence: list[float]) -> None:
    (alarm,) = judge(StaleParameters(), [GOOD], SampleChecks(stale=stale))
    assert (alarm.severity, alarm.layer) == (severity, layer)
    assert numbers_in(alarm.evidence) == evidence


def test_common_module() -> None:
    assert [common(names) for names in (["a.b.w"], ["a.b.w", "a.b.c.w"], ["a.w", "ab.w"])] == ["a.b.w", "a.b", ""]


def clipped(*pairs: tuple[float, float]) -> list[bool]:
    rule, history = GradientClipped(), History(facts=facts(adam_eps=None))
    return [
        bool(list(rule.on_sample(history, Sample(max(1, 10 * at), {}, checks=SampleChecks(norms=pair)))))
        for at, pair in enumerate(pairs)
    ]


def test_clipping_is_told_from_division() -> None:
    assert clipped((5, 0.01), (7, 0.01), (4, 0.01), (6, 0.01)) == [False, False, False, True]
    assert clipped((5, 0.05), (7, 0.07), (4, 0.04), (6, 0.06), (5, 0.05)) == [False] * 5
    assert clipped((5, 0.02), (7, 0.02), (1.9, 0.02), (6, 0.02), (5, 0.02)) == [False] * 5
    assert clipped((math.inf, 0.01), (math.nan, 0.01), (5, 0.0)) == [False] * 3


def batches(*values: float | None) -> list[str]:
    return severities(IdenticalBatches, [replace(GOOD, batch=value) for value in values])


def test_batches_that_are_equal_or_repeated_are_reported() -> None:
    assert batches(7, None, 7, None, None, 7, None, 7, None, 7) == [*"---------", "w"]
    assert batches(7, None, 7, None, 7, None, 7, None, 8, None, 7) == ["-"] * 11
    assert batches(*[7, 8] * 5, 9) == [*"---------", "w", "-"]
    assert batches(*[7, 8, 9] * 6) == ["-"] * 18
    repeated = [7, 7, None, 8, 9, None, 1, 1, None, 2, 3, None, 4, 4]
    assert batches(*repeated) == ["-"] * 13 + ["w"]  # 3 of 5 pairs
    assert batches(*repeated[:-1], 5) == ["-"] * 14


def test_gradients_that_the_optimizer_does_not_see_are_reported() -> None:
    emptied = replace(GOOD, emptied=True)
    assert severities(NoGradientRule, [emptied, GOOD, emptied, emptied]) == [*"---", "f"]
    assert severities(NoGradientRule, [GOOD] * 2, SampleChecks(norms=(3.0, 0.0))) == ["-", "f"]
    assert severities(NoGradientRule, [GOOD] * 2, SampleChecks(norms=(3.0, 1e-9))) == ["-", "-"]


# Numbers --------------------------------------------------------------------------------------------------------------

CUT = NoGradient("blocks.2", "blocks", ("embedding", "blocks.0", "blocks.1", "blocks.2"), 33, "blocks.3")
ZERO = NoGradient("blocks.2", "zero", ("blocks.2",), 1)
LEAF = NoGradient("blocks.2.q", "leaf", ("blocks.2.q",), 2)
SKIPPED_BLOCK = NoGradient("blocks.2", "skipped", ("blocks.2",), 12)
HIDDEN = NoGradient("blocks.3", "last blocks", ("blocks.3",), 16)
TOWER = NoGradient("vision.1", "stack", ("vision.0", "vision.1"), 16)
# Name: rule, steps, the samples' facts, numbers in the evidence and in the remedy.
CASES: dict[str, tuple[Rule, list[StepChecks], SampleChecks | None, list[float], list[float]]] = {
    "no-gradient": (NoGradientRule(), [replace(GOOD, no_gradient=(CUT,))] * 3, None, [4, 1, 33], []),
    "no-gradient, zero": (NoGradientRule(), [replace(GOOD, no_gradient=(ZERO,))] * 11, None, [0, 1, 1, 0], [0]),
    "no-gradient, leaf": (NoGradientRule(), [GOOD, *[replace(GOOD, no_gradient=(LEAF,))] * 20], None, [2, 2], []),
    "no-gradient, skipped": (NoGradientRule(), [replace(GOOD, no_gradient=(SKIPPED_BLOCK,))] * 10, None, [1, 12], []),
    "no-gradient, last": (NoGradientRule(), [replace(GOOD, no_gradient=(HIDDEN,))] * 5, None, [1, 16], []),
    "no-gradient, stack": (NoGradientRule(), [replace(GOOD, no_gradient=(TOWER,))] * 5, None, [1, 16], []),
    "no-gradient, none": (NoGradientRule(), [NONE] * 4, None, [4], []),
    "gradients-not-cleared": (GradientsNotCleared(), [replace(GOOD, kept=0.1)] * 7, None, [7], []),
    "learning-rate-zero": (LearningRateZero(), rates(1e-3, 1e-3, *[0.0] * 4), None, [0, 3, 0.001, 4], []),
    "learning-rate-zero, first": (LearningRateZero(), rates(*[0.0] * 4), None, [0, 1, 4], []),
    "learning-rate-zero, end": (LearningRateZero(), rates(1e-3, 5e-4, *[0.0] * 21), None, [0, 3, 5e-4, 21], []),
    # The median group keeps 95 %; 29 steps since step 1.
    "updates-lost": (UpdatesLost(), [GOOD] * 30, SampleChecks(lost=LOST), [95, 1, 29], []),
    "updates-lost, gains": (
        UpdatesLost(), [GOOD] * 20, SampleChecks(lost=Lost(4, "float16", (0.1,), 0.99)), [99, 4, 16], [],
    ),
    "steps-skipped": (
        StepsSkipped(), [GOOD, *[SKIPPED] * 9], SampleChecks(scale=4096.0), [9, 4100], [65536],
    ),
    "steps-skipped, pause": (StepsSkipped(), [replace(GOOD, stepped=False)] * 40, SampleChecks(), [40], []),
    "stale-parameters, moved": (
        StaleParameters(), [GOOD, *[replace(GOOD, stepped=False, moved=True)] * 6], None, [6], [],
    ),
    "stale-parameters, another model": (
        StaleParameters(), [GOOD, *[replace(NONE, stepped=True, setup=Setup(idle=True))] * 4], None, [4], [],
    ),
    "stale-parameters, another run": (StaleParameters(), [replace(NONE, stepped=False, setup=Setup(idle=True))] * 3, None, [3], []),
    "stale-parameters, no gradient": (
        StaleParameters(), [replace(NONE, stale=Stale(replaced=("q.w", "q.b"), unheld=("q.w", "q.b")))] * 2, None, [2], [],
    ),
    "replicas-differ": (
        ReplicasDiffer(), [GOOD] * 10, SampleChecks(replicas=(Replica(1, ("blocks.0",), 30, 20),)), [0, 1, 20, 30], [0],
    ),
    "replicas-differ, start": (
        ReplicasDiffer(), [GOOD] * 10,
        SampleChecks(replicas=(Replica(1, ("head", "blocks.0"), 1, None), Replica(3, ("head",), 1, None))),
        [2, 0, 1, 3, 1], [],
    ),
    "gradient-clipped": (
        GradientClipped(), [GOOD] * 40, SampleChecks(norms=(5.0, 0.01)), [0.2, 5, 0.01], [5, 1e-8],
    ),
    "no-gradient, cleared": (NoGradientRule(), [replace(GOOD, emptied=True)] * 4, None, [4], []),
    "no-gradient, set to 0": (NoGradientRule(), [GOOD] * 20, SampleChecks(norms=(1.0, 0.0)), [0], []),
    "identical-batches": (IdenticalBatches(), [GOOD, *[replace(GOOD, batch=3.0)] * 5], None, [5, 2, 6], []),
    "identical-batches, two": (
        IdenticalBatches(), [replace(GOOD, batch=float(at % 2)) for at in range(10)], None, [10, 1, 10], [],
    ),
    "identical-batches, repeated": (
        IdenticalBatches(), [replace(GOOD, batch=float(at // 4)) for at in range(8)], None, [6, 7, 8], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "steps", "sample", "evidence", "remedy"), CASES.values(), ids=list(CASES))
def test_numbers_of_an_alarm(
    rule: Rule, steps: list[StepChecks], sample: SampleChecks | None, evidence: list[float], remedy: list[float]
) -> None:
    (alarm,) = judge(rule, steps, sample)
    assert numbers_in(alarm.evidence) == pytest.approx(evidence)
    assert numbers_in(alarm.remedy) == pytest.approx(remedy)


def test_clipping_without_adam_is_explained_by_the_size_of_the_updates() -> None:
    (alarm,) = judge(GradientClipped(), [GOOD] * 40, SampleChecks(norms=(5.0, 0.01)), adam_eps=None)
    assert numbers_in(alarm.remedy) == [5, 500]


@pytest.mark.parametrize(("tokens", "named"), [(512, True), (9, True), (7, False), (1, False)])
def test_clipping_of_a_summed_loss_is_not_blamed_on_the_limit(tokens: int, named: bool) -> None:
    """With equal probabilities for 256 classes the loss of one token is ln 256."""
    rule, history = GradientClipped(), History(facts=facts(), classes=256)
    history.steps.append(Step(1, tokens * math.log(256), 782.0, 1e-3))
    checks = SampleChecks(norms=(782.0, 1.0))
    reports = [alarm for step in (1, 10, 20, 30) for alarm in rule.on_sample(history, Sample(step, {}, checks=checks))]
    assert reports
    for alarm in reports:
        assert (
            alarm.remedy.startswith(f"Check whether the loss is a sum over tokens: the first loss is {tokens}") == named
        )
        assert alarm.remedy.startswith("Raise max_norm to about 800") != named


def test_gradient_that_has_grown_is_not_a_matter_of_the_clipping() -> None:
    for norm, grown in ((11.0, True), (9.9, False)):
        (alarm,) = judge(GradientClipped(), [GOOD] * 40, SampleChecks(norms=(norm, 0.05)))
        assert ("11 times as large as it was until step 20" in alarm.remedy) == grown
        assert ("Raise max_norm" in alarm.remedy) != grown


def test_histories_without_checks_raise_nothing() -> None:
    """As those of a record that another version wrote."""
    rules = [rule for rule, *_ in CASES.values()]
    for rule in {type(rule): type(rule)() for rule in rules}.values():
        assert judge(rule, [None] * 40, SampleChecks()) == []


def test_missing_gradient_explains_a_loss_that_does_not_fall() -> None:
    history, judge_all = History(facts=facts()), Judge()
    alarms = []
    for number in range(1, 80):
        history.steps.append(Step(number, 3.0, 1.0, 0.0, replace(GOOD, rates=(0.0,))))
        alarms += judge_all.judge_steps(history, [history.steps[-1]])
    found = {alarm.rule: alarm for alarm in alarms}
    assert found["learning-rate-zero"].severity == "fail"
    assert found["no-progress"].severity == "warn"
    assert found["no-progress"].cause == found["learning-rate-zero"].ref
