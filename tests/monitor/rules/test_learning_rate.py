"""learning-rate: the first updates against the initial weights, harm, optimizers of several kinds, and real runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.histories import Signals, facts, first, give_samples, give_steps, numbers_in, rates
from helpers.tiny_runs import TinyGPT, named, of_rule, train_tiny
from torch import Tensor, nn

from omninorm.monitor import Alarm, History
from omninorm.monitor.rules.learning_rate import LearningRate

pytestmark = pytest.mark.usefixtures("words")
STUCK = [5.0] * 40


def judge(
    samples: list[Signals], losses: list[float], lrs: list[float] | None = None, **known: Any
) -> list[list[Alarm]]:
    """Return the reports about samples of a run whose losses are all known."""
    about = {name: known.pop(name) for name in ("placement", "passes") if name in known}
    history, rule = History(facts=facts(**known), **about), LearningRate()
    give_steps(rule, losses, lrs=lrs or (), history=history)
    return give_samples(rule, samples, history)


@pytest.mark.parametrize(
    ("ratio", "known", "fails"),
    [
        (0.46, {}, True), (0.44, {}, False),
        (0.23, {"width": 256.0}, True), (0.22, {"width": 256.0}, False), (0.44, {"width": 16.0}, False),
        (0.46, {"width": 256.0, "optimizer": "Muon"}, True), (0.44, {"width": 256.0, "optimizer": "Muon"}, False),
        (0.076, {"placement": "post"}, True), (0.074, {"placement": "post"}, False),
        (0.019, {"optimizer": "SGD"}, True), (0.017, {"optimizer": "SGD"}, False), (0.1, {"optimizer": "SignSGD"}, False),
    ],
)  # fmt: skip
def test_first_update_above_one_and_a_half_times_the_limit_fails_with_harm(
    ratio: float, known: dict[str, Any], fails: bool
) -> None:
    samples = [rates(ratio, 0.1), rates(0.01, 0.1)]
    assert [alarm.severity for alarm in judge(samples, STUCK, **known)[-1]] == ["fail"] * fails
    falling = [5.0 * 0.98**step for step in range(40)]
    assert judge(samples, falling, **known)[-1] == []


def test_evidence_has_the_factor_and_the_updates() -> None:
    (alarm,) = judge([rates(0.9, 0.1), rates(0.1, 0.1)], STUCK)[-1]
    assert alarm.evidence.startswith("Learning rate at least 3-fold too high")
    # 90 % of the initial weights, 30 % at most, and the loss.
    assert numbers_in(alarm.evidence) == [3, 90, 30, 5, 5]
    assert numbers_in(alarm.remedy) == [3, 9]


def test_updates_are_compared_with_the_initial_weights() -> None:
    """The weights have grown 20-fold by step 10, so an update of 5 % of them is as large as the initial ones."""
    initial = rates(0.0, 0.02)
    (alarm,) = judge([initial, rates(0.05, 0.4), rates(0.05, 0.4)], STUCK)[1]
    assert alarm.evidence.startswith("Learning rate at least 3.3-fold")
    assert judge([initial, *[rates(0.05, 0.02)] * 4], STUCK)[-1] == []


def test_updates_at_the_full_learning_rate_follow_from_the_warm_up() -> None:
    samples = [rates(0.09, 0.1), *[rates(0.01, 0.1)] * 3]
    warm_up = [1e-4 * min(step, 10) for step in range(1, 41)]
    assert "at least 3-fold" in judge(samples, STUCK, warm_up)[-1][0].evidence
    assert judge(samples, STUCK)[-1] == [], "a constant learning rate"
    sgd = [rates(0.001, 0.1), *[rates(0.1, 0.1)] * 3]  # 0.1 % at a tenth of the learning rate; later steps do not count
    assert judge(sgd, STUCK, warm_up, optimizer="SGD")[-1] == []
    sgd[0] = rates(0.0036, 0.1)
    assert "at least 3-fold" in judge(sgd, STUCK, warm_up, optimizer="SGD")[-1][0].evidence


@pytest.mark.parametrize(("at", "factor", "named"), [(12, 5.1, True), (12, 4.9, False), (9, 5.1, False)])
def test_jump_of_the_learning_rate_is_named(at: int, factor: float, named: bool) -> None:
    """A sudden rise after the first steps; before that, it may be a warm-up."""
    lrs = [1e-3] * (at - 1) + [factor * 1e-3] * (41 - at)
    (alarm,) = judge([rates(0.15, 0.1), *[rates(0.1, 0.1)] * 3], STUCK, lrs)[-1]
    assert (f"from 0.001 to {factor / 1000:.3g} at step {at}." in alarm.evidence) == named
    assert (f"Undo the jump of the schedule at step {at}" in alarm.remedy) == named


def test_late_updates_are_not_compared_with_the_initial_weights() -> None:
    early, late = [rates(0.01, 0.1)] * 6, [rates(0.02, 3.0)] * 4  # steps 1 to 50, and 60 to 90
    assert judge([*early, *late], [5.0] * 90)[-1] == []
    assert judge([*early[:4], *late], [5.0] * 90)[-1] != []


def test_large_updates_without_harm_are_a_warning() -> None:
    falling = [5.0 * 0.98**step for step in range(60)]
    reports = judge([rates(0.1, 0.1), *[rates(0.61, 0.1)] * 4], falling)
    assert first(reports) == 3
    assert reports[3][0].severity == "warn"
    assert first(judge([rates(0.1, 0.1), *[rates(0.59, 0.1)] * 5], falling)) is None


def test_loss_above_its_initial_value_is_harm() -> None:
    rising = [5.0 + 0.1 * number for number in range(1, 20)]  # too few to see whether it has stopped falling
    (alarm,) = judge([rates(0.6, 0.1), rates(0.1, 0.1)], rising)[-1]
    # Means of the last 5 and the first 4 losses: 5 + 0.1 · (15 + … + 19)/5 and 5 + 0.1 · (1 + … + 4)/4.
    assert numbers_in(alarm.evidence)[-2:] == [6.7, 5.25]
    assert judge([rates(0.6, 0.1)], rising[:7])[-1] == [], "seven losses are too few"


def test_stalled_loss_is_harm_and_is_reported_with_its_newest_mean() -> None:
    (alarm,) = judge([rates(0.6, 0.1), rates(0.1, 0.1)], [*[5.0] * 4, *[3.0] * 21, *[3.25] * 15])[-1]
    assert numbers_in(alarm.evidence)[-1] == 3.25
    assert alarm.severity == "warn", "a loss on a plateau may fall again"
    assert judge([rates(0.6, 0.1), rates(0.1, 0.1)], [*[5.0] * 4, *[3.0] * 21, *[2.9] * 15])[-1] == []


def test_collapsed_attention_is_harm() -> None:
    for entropy, fails in ((0.29, True), (0.31, False)):
        (*_, report) = judge([rates(0.6, 0.1), rates(0.1, 0.1, entropy)], [])
        assert [alarm.severity for alarm in report] == ["fail"] * fails
        if fails:
            assert numbers_in(report[0].evidence)[-2:] == [0.29, 0.9]


@pytest.mark.parametrize(("now", "fails"), [(0.9e3, False), (1.1e3, True)])
def test_exploded_residual_stream_is_harm(now: float, fails: bool) -> None:
    first, second = ({**rates(0.6, 0.1), "stream_rms": [value] * 2} for value in (1.0, now))
    (*_, report) = judge([first, second], [])
    assert [alarm.severity for alarm in report] == ["fail"] * fails
    assert not fails or "the residual stream has grown 1,100-fold" in report[0].evidence


def test_learning_rate_is_judged_by_the_quiet_blocks() -> None:
    """One of ten blocks does not change; the embedding does not count, because PyTorch initializes it with std 1."""
    loud = {"update_ratio": [*[0.6] * 18, *[0.01] * 3], "weight_rms": [0.1] * 21}
    assert judge([loud, loud], STUCK, blocks=20)[-1] != [], "two of 20 blocks are quiet"
    quiet = {"update_ratio": [*[0.6] * 17, *[0.01] * 3, 0.6], "weight_rms": [0.1] * 21}
    assert judge([quiet, quiet], STUCK, blocks=20)[-1] == [], "three of 20 blocks are quiet"


def test_weights_initialized_to_zero_do_not_count() -> None:
    fresh = {"update_ratio": [*[1e20] * 4, 1e-3], "weight_rms": [*[1e-3] * 4, 0.1]}
    assert judge([fresh, rates(1e-3, 0.1)], STUCK)[-1] == []


def test_new_head_on_a_frozen_model_needs_a_rising_loss() -> None:
    def head(ratio: float) -> Signals:
        return {"update_ratio": [*[None] * 4, ratio], "weight_rms": [0.1] * 5}

    assert judge([head(0.9), head(0.1)], [*[5.0] * 4, *[3.0] * 36])[-1] == [], "a plateau"
    assert judge([head(0.9), head(0.1)], [*[5.0] * 4, *[5.9] * 36])[-1] == [], "noise"
    assert judge([head(0.9), head(0.1)], [*[5.0] * 4, *[6.1] * 36])[-1] != []


def test_late_doubling_of_the_weights_is_reported_with_harm() -> None:
    early = [rates(0.01, 0.1)] * 10  # to step 90
    for weights, expected in ((0.2, ["warn"]), (0.199, [])):
        reports = judge([*early, rates(0.06, weights)], [*[5.0] * 30, *[4.0] * 70])
        assert [alarm.severity for alarm in reports[-1]] == expected
    (alarm,) = judge([*early, rates(0.06, 0.2)], [*[5.0] * 30, *[4.0] * 70])[-1]
    assert numbers_in(alarm.evidence) == [100, 6, 1, 2, 50, 4], "6 % at step 100; 2-fold since step 50; the loss"
    assert judge([*early[:9], rates(0.06, 0.2)], [*[5.0] * 30, *[4.0] * 70])[-1] == [], "since step 40"
    assert judge([*early, rates(0.049, 0.2)], [*[5.0] * 30, *[4.0] * 70])[-1] == [], "by small updates"


def test_accumulated_losses_are_named_as_a_possible_cause() -> None:
    (alarm,) = judge([rates(0.6, 0.1), rates(0.1, 0.1)], STUCK, passes=4)[-1]
    assert "4 accumulation steps" in alarm.remedy


def test_resumed_run_is_judged_by_later_samples_only() -> None:
    history, rule = History(facts=facts()), LearningRate()
    give_steps(rule, STUCK, history=history)
    reports = give_samples(rule, [{}, rates(0.9, 0.1), rates(0.9, 0.1)], history)
    assert reports[-1] == []


def test_learning_rate_explains_spikes_and_dead_units() -> None:
    assert {"loss-spike", "gradient-spike", "dead-units"} <= set(LearningRate.explains)


# Real runs ------------------------------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Updates by the sign of a moving average of the gradient."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(torch.sign(0.9 * average + 0.1 * p.grad), alpha=group["lr"])
                average.lerp_(p.grad, 0.01)


def optimizer_of(kind: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if kind == "SGD":
        return torch.optim.SGD(parameters, lr, momentum=0.9)
    return Lion(parameters, lr) if kind == "Lion" else torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95))


def alarms_at(kind: str, lr: float, model: nn.Module | None = None, steps: int = 40) -> list[Alarm]:
    torch.manual_seed(0)
    model = model or TinyGPT()
    watched, _ = train_tiny(model, optimizer_of(kind, model, lr), steps=steps)
    return of_rule(watched, "learning-rate")


# The largest learning rates that train are 4e-3, 4e-3 and 0.4 (see the rule).
@pytest.mark.parametrize(("kind", "largest"), [("AdamW", 4e-3), ("Lion", 4e-3), ("SGD", 0.4)])
def test_learning_rates_that_train_raise_no_alarm_and_higher_ones_fail(kind: str, largest: float) -> None:
    assert alarms_at(kind, largest / 3) == []
    for times in (8, 30):
        alarm = alarms_at(kind, times * largest)[0]
        assert alarm.severity == "fail"
        assert times / 3 <= numbers_in(alarm.evidence)[0] <= 3 * times


def test_muon_at_its_usual_learning_rate_raises_no_alarm() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    matrices = [p for p in model.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    adam = torch.optim.AdamW(others, 1e-3)
    step = lambda model, optimizers, step: (adam.step(), adam.zero_grad())  # noqa: E731
    watched, losses = train_tiny(model, torch.optim.Muon(matrices, lr=0.02), steps=40, after=step)
    assert losses[-1] < 0.6 * losses[0]
    assert named(of_rule(watched, "learning-rate")) == []


def test_new_head_on_a_frozen_backbone_raises_no_alarm() -> None:
    torch.manual_seed(0)
    model = TinyGPT().requires_grad_(False)
    model.head = nn.Linear(64, 256)
    nn.init.zeros_(model.head.weight)
    watched, losses = train_tiny(model, lr=1e-2, steps=50)
    assert losses[-1] < losses[0]
    assert named(of_rule(watched, "learning-rate")) == []
