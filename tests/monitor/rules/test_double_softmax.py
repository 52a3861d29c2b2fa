"""double-softmax: cross entropy receives probabilities instead of logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.histories import numbers_in
from helpers.tiny_runs import TinyGPT, named, of_rule, train_tiny
from torch import Tensor, nn

from omninorm.monitor import Alarm, History, Sample, Step, watch
from omninorm.monitor.probes.loss import MOST_ROWS, are_probabilities, some_predictions
from omninorm.monitor.rules.double_softmax import DoubleSoftmax

pytestmark = pytest.mark.usefixtures("words")


def judge(losses: list[float], facts: list[float | None]) -> list[list[Alarm]]:
    """Return the alarms of each sample; they are 10 steps apart, the first is at step 1."""
    rule, history, reports = DoubleSoftmax(), History(), []
    for number, loss in enumerate(losses, start=1):
        history.steps.append(Step(number, loss, 1.0, 1e-3))
        assert not list(rule.on_step(history, history.steps[-1]))
        if number == 1 or number % 10 == 0:
            fact = facts[number // 10]
            history.samples.append(Sample(number, {}, probabilities=fact))
            reports.append(list(rule.on_sample(history, history.samples[-1])))
    return reports


def test_two_samples_warn_and_an_unchanged_loss_fails() -> None:
    reports = judge([5.5] * 40, [1.0] * 5)
    assert [[alarm.severity for alarm in alarms] for alarms in reports] == [[], ["warn"], ["warn"], ["fail"], ["fail"]]
    assert numbers_in(reports[-1][0].evidence) == [0, 1, 2, 5.5, 5.5]


def test_falling_loss_only_warns() -> None:
    assert {
        alarm.severity for alarms in judge([5.5 - 0.01 * at for at in range(40)], [1.0] * 5) for alarm in alarms
    } == {"warn"}
    assert {alarm.severity for alarms in judge([math.nan] * 40, [1.0] * 5) for alarm in alarms} == {"warn"}


def test_logits_and_unmeasured_samples_are_silent() -> None:
    assert judge([5.5] * 40, [0.0] * 5) == [[]] * 5
    assert judge([5.5] * 40, [None] * 5) == [[]] * 5
    assert judge([5.5] * 40, [1.0, 0.0] * 3) == [[]] * 5
    assert judge([5.5] * 20, [1.0, None, 1.0])[2] != []  # an unmeasured sample does not interrupt


# The measurement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (300, 50), (3, 9, 40), (3, 300, 2, 3, 2), (200, 2, 200)])
def test_probabilities_are_distinguished_in_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape)
    dim = min(1, len(shape) - 1)
    for values, expected in (
        (logits, 0), (logits.log_softmax(dim), 0), (logits.sigmoid(), 0), (logits.softmax(dim), 1),
        (logits.softmax(dim) * 1.05, 0), (torch.zeros(shape), 0),
    ):  # fmt: skip
        rows = some_predictions(values.to(dtype))
        assert rows.shape[0] <= MOST_ROWS
        assert rows.shape[1] == shape[dim]
        assert are_probabilities(rows) == expected


def test_sums_beyond_the_tolerance_are_not_probabilities() -> None:
    rows = torch.full((4, 10), 0.1)
    assert are_probabilities(rows) == 1
    rows[2, 3] += 0.002
    assert are_probabilities(rows) == 0
    rows[2, 3] -= 0.0015
    assert are_probabilities(rows) == 1
    assert are_probabilities(torch.tensor([[1.5, -0.5]])) == 0


class Classifier(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.layer = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def facts_of_loss(loss_of: object, classes: int = 5) -> list[float | None]:
    """Return the measured fact of 3 steps, and check that the losses and gradients equal those without a watch."""
    runs = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, x, results = Classifier(classes), torch.randn(6, 8), []
        watching = watch(model, every=1)
        if watched:
            watching.open()
        for _ in range(3):
            loss = loss_of(model(x))  # type: ignore[operator]
            model.zero_grad()
            loss.backward()
            results += [loss.detach(), model.layer.weight.grad.clone()]  # type: ignore[union-attr]
            if watched:
                watching.step(loss)
        watching.close()
        runs.append(results)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    return [sample.probabilities for sample in watching.history.samples]


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
SOFT = torch.full((6, 5), 0.2)


@pytest.mark.parametrize(
    ("loss_of", "expected"),
    [
        (lambda y: F.cross_entropy(y, LABELS), 0),
        (lambda y: F.cross_entropy(y.softmax(-1), LABELS), 1),
        (lambda y: nn.CrossEntropyLoss()(y.softmax(-1), LABELS), 1),
        (lambda y: F.cross_entropy(input=y.softmax(-1), target=LABELS), 1),
        (lambda y: F.cross_entropy(y.log_softmax(-1), LABELS), 0),
        (lambda y: F.cross_entropy(y, SOFT), 0),
        (lambda y: F.cross_entropy(y, SOFT, label_smoothing=0.1), 0),
        (lambda y: F.cross_entropy(y.softmax(-1), LABELS.where(LABELS > 1, -100), ignore_index=-100), 1),
        (lambda y: F.cross_entropy(y.T[None], torch.tensor([[0, 1, 2, 3, 4, 0]])), 0),
        (lambda y: F.cross_entropy(y.softmax(-1).T[None], torch.tensor([[0, 1, 2, 3, 4, 0]])), 1),
        (lambda y: F.cross_entropy(y[0].softmax(-1), torch.tensor(2)), 1),
        (lambda y: y.sum() + F.cross_entropy(y.softmax(-1).detach(), LABELS), None),
        (lambda y: F.nll_loss(y.log_softmax(-1), LABELS), None),
    ],
)  # fmt: skip
def test_fact_of_each_call_of_cross_entropy(loss_of: object, expected: int | None) -> None:
    assert facts_of_loss(loss_of) == [expected] * 3


def test_one_class_is_not_measured() -> None:
    zeros = torch.zeros(6, dtype=torch.long)
    assert facts_of_loss(lambda y: y.sum() + F.cross_entropy(y.softmax(-1), zeros), classes=1) == [None] * 3


def test_torch_func_is_not_measured() -> None:
    def loss_of(y: Tensor) -> Tensor:
        torch.func.vmap(torch.func.grad(lambda z, label: F.cross_entropy(z.softmax(-1), label)))(y, LABELS)
        return y.sum()

    assert facts_of_loss(loss_of) == [None] * 3


def test_function_is_restored_and_other_errors_are_those_of_torch() -> None:
    original = F.cross_entropy
    with watch(Classifier()), pytest.raises(TypeError, match="cross_entropy"):
        F.cross_entropy()  # type: ignore[call-arg]
    assert F.cross_entropy is original


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_loss_is_one_graph_and_not_measured() -> None:
    model, x = Classifier(), torch.randn(6, 8)
    with watch(model, every=1) as watched:
        loss_of = torch.compile(lambda y: F.cross_entropy(y.softmax(-1), LABELS), backend="aot_eager", fullgraph=True)
        for _ in range(2):
            loss = loss_of(model(x))
            loss.backward()
            watched.step(loss)
    assert [sample.probabilities for sample in watched.history.samples] == [None, None]


# Real runs ------------------------------------------------------------------------------------------------------------


def run(change: object, steps: int = 30) -> list[Alarm]:
    def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = change(model(tokens[:, :-1]).flatten(0, 1))  # type: ignore[operator]
        return F.cross_entropy(logits, tokens[:, 1:].flatten())

    torch.manual_seed(0)
    watched, _ = train_tiny(TinyGPT(), steps=steps, loss_of=loss_of)
    return of_rule(watched, "double-softmax")


def test_softmax_before_the_loss_is_reported() -> None:
    found = named(run(lambda logits: logits.softmax(-1)))
    assert found[0] == ("warn", "double-softmax", None)


@pytest.mark.parametrize("change", [lambda logits: logits, lambda logits: logits.log_softmax(-1)])
def test_logits_and_log_probabilities_are_silent(change: object) -> None:
    assert run(change) == []
