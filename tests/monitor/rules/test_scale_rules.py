"""Rules about values that jump: inputs, embeddings, the gradient on its way through a block, and the first loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.histories import Signals, facts, give_samples, numbers_in

from omninorm.monitor import Alarm, History, Sample, Step
from omninorm.monitor.checks.facts import StepChecks
from omninorm.monitor.rules import Rule
from omninorm.monitor.rules.embedding_scale import EmbeddingScale
from omninorm.monitor.rules.gradient_jump import GradientJump
from omninorm.monitor.rules.initialization import Initialization
from omninorm.monitor.rules.input_scale import InputScale

pytestmark = pytest.mark.usefixtures("words")


def give_checks(rule: Rule, checks: Sequence[StepChecks | None]) -> list[list[Alarm]]:
    """Return what the rule reports at each step."""
    history, reports = History(facts=facts()), []
    for number, each in enumerate(checks, start=1):
        history.steps.append(Step(number, 3.0, 1.0, 1e-3, each))
        reports.append(list(rule.on_step(history, history.steps[-1])))
    return reports


def inputs(values: Sequence[float]) -> list[StepChecks | None]:
    return [StepChecks(input=value) for value in values]


def embeddings(values: Sequence[float], after: float = 1.0) -> list[StepChecks | None]:
    """An embedding whose output is this large, and a module after it that is `after` times as large."""
    return [StepChecks(before_blocks=(("embedding", value), ("position", after * value))) for value in values]


def severities(reports: list[list[Alarm]]) -> str:
    return "".join(alarms[0].severity[0] if alarms else "-" for alarms in reports)


def test_inputs_on_another_scale_fail_at_the_second_step() -> None:
    reports = give_checks(InputScale(), inputs([1.0, 1.2, 0.9, 1.0, 180.0, 190.0, 1.0]))
    assert severities(reports) == "-----f-"
    # Since step 5; the median of the steps before is 1.
    assert numbers_in(reports[5][0].evidence) == pytest.approx([5, 190, 1, 190])


@pytest.mark.parametrize(("factor", "expected"), [(9.0, "-"), (11.0, "w"), (51.0, "f"), (1 / 9, "-"), (1 / 11, "w")])
def test_limits_of_inputs(factor: float, expected: str) -> None:
    assert severities(give_checks(InputScale(), inputs([1.0] * 8 + [factor] * 2)))[-1] == expected


def test_one_unusual_batch_and_early_steps_are_no_jump() -> None:
    assert severities(give_checks(InputScale(), inputs([1.0] * 6 + [200.0] + [1.0] * 3))) == "-" * 10
    assert severities(give_checks(InputScale(), inputs([1.0, 1.0, 200.0, 200.0, 200.0]))) == "-" * 5
    assert severities(give_checks(InputScale(), [StepChecks(), None, *inputs([0.0, math.inf, math.nan])])) == "-" * 5


def test_embedding_that_jumps_is_named_before_what_follows_it() -> None:
    reports = give_checks(EmbeddingScale(), embeddings([0.3] * 10 + [300.0] * 2, after=2.0))
    assert severities(reports) == "-" * 11 + "f"
    assert [alarm.layer for alarm in reports[-1]] == ["embedding"]
    assert numbers_in(reports[-1][0].evidence) == pytest.approx([11, 1000, 0.3, 300])


@pytest.mark.parametrize(("factor", "expected"), [(19.0, "-"), (21.0, "w"), (101.0, "f"), (1e-3, "-")])
def test_limits_of_embeddings(factor: float, expected: str) -> None:
    assert severities(give_checks(EmbeddingScale(), embeddings([1.0] * 8 + [factor] * 2)))[-1] == expected


def test_slow_growth_is_no_jump() -> None:
    assert set(severities(give_checks(EmbeddingScale(), embeddings([1.1**step for step in range(60)])))) == {"-"}


# Gradients ------------------------------------------------------------------------------------------------------------


def passage(gradients: Sequence[float], streams: Sequence[float] = (1.0,) * 4) -> Signals:
    return {"stream_grad": list(gradients), "stream_rms": list(streams)}


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ((1e3, 1e3, 1.0, 1.0), ("fail", "blocks.2")),  # explodes on its way back through block 2
        ((1e-8, 1e-8, 1.0, 1.0), ("fail", "blocks.2")),
        ((50.0, 1.0, 1.0, 1.0), ("warn", "blocks.1")),
        ((20.0, 1.0, 1.0, 1.0), None),
        ((1e9, 1e6, 1e3, 1.0), None),  # in every block: depth-growth reports it
    ],
)
def test_gradient_jump_names_the_block(gradients: Sequence[float], expected: tuple[str, str] | None) -> None:
    reports = give_samples(GradientJump(), [passage(gradients)] * 4)
    found = [(alarm.severity, alarm.layer) for alarm in reports[-1]]
    assert found == ([] if expected is None else [expected])
    assert reports[1] == []  # two samples are not enough


def test_gradient_follows_a_stream_that_changes_its_scale() -> None:
    # The first block multiplies the stream by 1,000, so the gradient at its input is 1,000 times larger in any model
    # with norms.
    scaled = passage((1.0, 1e-3, 1e-3, 1e-3), (1e-3, 1.0, 1.0, 1.0))
    assert give_samples(GradientJump(), [scaled] * 4)[-1] == []


def test_numbers_of_a_gradient_jump() -> None:
    (alarm,) = give_samples(GradientJump(), [passage((2e3, 1e3, 1.0, 1.0))] * 4)[-1]
    assert numbers_in(alarm.evidence) == [1000]


def test_gradient_jump_in_a_decoder_of_two_blocks() -> None:
    history = History(facts=facts(chains=((0, 1), (2, 3))))
    (alarm,) = give_samples(GradientJump(), [passage((1.0, 1.0, 500.0, 1.0))] * 4, history)[-1]
    assert alarm.layer == "blocks.3"
    # Between the two stacks nothing is compared.
    assert give_samples(GradientJump(), [passage((500.0, 500.0, 1.0, 1.0))] * 4, history)[-1] == []


# The first loss -------------------------------------------------------------------------------------------------------


def first_sample(loss: float, log_z: float | None, **changes: Any) -> list[Alarm]:
    given = {"facts": facts(fresh=True), "classes": 256, **changes}
    history = History(**given)
    history.steps.append(Step(1, loss, 1.0, 1e-3))
    signals: Signals = {"weight_rms": [0.1, 0.1, 0.2, 0.1, 0.8]}
    signals |= {} if log_z is None else {"logz_mean": [log_z]}
    history.samples.append(Sample(1, signals))
    return list(Initialization().on_sample(history, history.samples[-1]))


def test_first_loss_far_above_equal_probabilities_warns() -> None:
    (alarm,) = first_sample(17.6, 12.0)
    assert (alarm.severity, alarm.layer) == ("warn", None)
    assert numbers_in(alarm.evidence) == pytest.approx([17.6, 256, 5.55, 12, 0.8])
    assert "embedding" in alarm.evidence


@pytest.mark.parametrize(
    ("loss", "log_z", "changes"),
    [
        (7.0, 12.0, {}),  # 1.45 above ln(256)
        (17.6, 6.5, {}),  # the logits are small: the loss is a sum, or has other terms
        (17.6, None, {}),
        (math.nan, 12.0, {}),
        (17.6, 12.0, {"facts": facts(fresh=False)}),
        (17.6, 12.0, {"facts": facts(fresh=None)}),
        (17.6, 12.0, {"classes": None}),
    ],
)
def test_other_first_losses_do_not_warn(loss: float, log_z: float | None, changes: dict[str, Any]) -> None:
    assert first_sample(loss, log_z, **changes) == []
