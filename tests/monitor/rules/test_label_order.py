"""label-order: labels of a language model that do not belong to its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.histories import facts, numbers_in
from helpers.tiny_runs import TinyGPT, of_rule, train_tiny
from torch import Tensor, nn

from omninorm.monitor import Alarm, History, Sample
from omninorm.monitor.rules.label_order import LabelOrder

pytestmark = pytest.mark.usefixtures("words")
GOOD = Sample(1, {}, next_tokens=1.0, shifted_tokens=0.1, same_tokens=0.98, visible_future=[0.0, None, 0.0, 0.0])
BAD = replace(GOOD, next_tokens=0.07)


def judge(samples: list[Sample], every: int = 10, history: History | None = None) -> list[list[Alarm]]:
    """Return the reports at each sample."""
    rule, history = LabelOrder(), history or History(facts=facts(4))
    reports = []
    for at, sample in enumerate(samples):
        history.samples.append(replace(sample, step=max(1, at * every)))
        reports.append(list(rule.on_sample(history, history.samples[-1])))
    return reports


def places(samples: list[Sample], every: int = 10, history: History | None = None) -> list[int]:
    """Return the samples with a report."""
    return [at for at, reports in enumerate(judge(samples, every, history)) if reports]


# On histories ---------------------------------------------------------------------------------------------------------


def test_labels_that_no_longer_match_are_reported_at_the_second_sample() -> None:
    reports = judge([GOOD] * 4 + [BAD] * 3 + [GOOD])
    assert [len(found) for found in reports] == [0, 0, 0, 0, 0, 1, 1, 0]
    assert numbers_in(reports[5][0].evidence) == [30, 50, 7]
    assert numbers_in(reports[5][0].remedy) == [30]


@pytest.mark.parametrize(
    "samples",
    [
        [GOOD] * 2 + [BAD] * 2,
        [GOOD] * 4 + [BAD, GOOD, BAD],
        [GOOD, replace(GOOD, next_tokens=0.98)] * 3 + [BAD] * 2,
        [GOOD] * 4 + [replace(BAD, next_tokens=0.5)] * 4,
        [GOOD] * 4 + [replace(BAD, next_tokens=None)] * 4,
    ],
    ids=["too few before", "one sample", "another task before", "half", "unknown"],
)
def test_labels_that_may_match_are_silent(samples: list[Sample]) -> None:
    assert places(samples) == []


def test_labels_in_another_order_are_reported_at_three_samples_over_twenty_steps() -> None:
    assert places([BAD] * 5) == [3, 4]
    assert places([BAD] * 5, every=50) == [2, 3, 4]
    (alarm,) = judge([BAD] * 4)[-1]
    assert numbers_in(alarm.evidence) == [98, 7]


@pytest.mark.parametrize(
    "changes",
    [
        {"same_tokens": 0.94}, {"same_tokens": None}, {"shifted_tokens": 0.5}, {"shifted_tokens": None},
        {"visible_future": [0.0, 0.5]}, {"visible_future": [None]}, {"visible_future": ()}, {"next_tokens": 0.5},
    ],
)  # fmt: skip
def test_other_tasks_may_have_other_labels(changes: dict[str, object]) -> None:
    assert places([replace(BAD, **changes)] * 5) == []  # type: ignore[arg-type]


def test_several_stacks_may_have_labels_in_another_order() -> None:
    chains = ((0, 1), (2, 3))
    assert places([BAD] * 5, history=History(facts=facts(4, chains=chains))) == []
    assert places([GOOD] * 4 + [BAD] * 2, history=History(facts=facts(4, chains=chains))) == [5]


# Real runs ------------------------------------------------------------------------------------------------------------

Labels = Callable[[Tensor, Tensor], Tensor]


def shuffled(inputs: Tensor, labels: Tensor) -> Tensor:
    return labels.flatten()[torch.randperm(labels.numel())].view_as(labels)


def of_other_rows(inputs: Tensor, labels: Tensor) -> Tensor:
    return labels.roll(1, 0)


def their_own(inputs: Tensor, labels: Tensor) -> Tensor:
    """As in a model that shifts its input itself."""
    return inputs


def two_ahead(inputs: Tensor, labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def some_ignored(inputs: Tensor, labels: Tensor) -> Tensor:
    return labels.masked_fill(torch.rand(labels.shape) < 0.7, -100)


def alarms_with(labels_of: Labels, begins: int = 1) -> list[Alarm]:
    """Return the rule's alarms of a run with other labels from a step on."""
    torch.manual_seed(0)
    steps = iter(range(1, 1000))

    def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if next(steps) >= begins:
            labels = labels_of(inputs, labels)
        return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())

    watched, _ = train_tiny(TinyGPT(), steps=40, loss_of=loss_of)
    return of_rule(watched, "label-order")


@pytest.mark.parametrize("labels_of", [shuffled, of_other_rows])
def test_shuffled_labels_are_named(labels_of: Labels) -> None:
    (alarm,) = alarms_with(labels_of)
    assert (alarm.step, alarm.severity, alarm.layer) == (25, "warn", None)
    assert alarm.evidence.startswith("Labels in another order")


@pytest.mark.parametrize("labels_of", [shuffled, of_other_rows, their_own, two_ahead])
def test_labels_that_change_during_the_run_are_named(labels_of: Labels) -> None:
    (alarm,) = alarms_with(labels_of, begins=18)
    assert alarm.step == 25
    assert alarm.evidence.startswith("Labels no longer match the input: up to step 15")


@pytest.mark.parametrize("labels_of", [lambda inputs, labels: labels, their_own, two_ahead, some_ignored])
def test_labels_at_one_distance_are_legitimate(labels_of: Labels) -> None:
    assert alarms_with(labels_of) == []


def test_random_inputs_are_named() -> None:
    torch.manual_seed(0)
    steps = iter(range(1, 1000))

    def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
        inputs = tokens[:, :-1]
        inputs = torch.randint_like(inputs, 256) if next(steps) >= 18 else inputs
        return F.cross_entropy(model(inputs).flatten(0, 1), tokens[:, 1:].flatten())

    watched, _ = train_tiny(TinyGPT(), steps=40, loss_of=loss_of)
    assert [alarm.step for alarm in of_rule(watched, "label-order")] == [25]
