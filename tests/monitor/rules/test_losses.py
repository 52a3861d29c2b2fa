"""loss-rising, held-out-rising, suspicious-loss and no-progress after learning: histories and real runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from helpers.histories import facts, give_steps, noise, numbers_in, rates
from helpers.tiny_runs import BATCH, SEQ, VOCAB, TinyGPT, named, next_token_loss, of_rule, train_tiny
from torch import Tensor, nn

from omninorm.errors import ConfigError, InputError, RunError
from omninorm.monitor import Alarm, History, Sample, Step, watch
from omninorm.monitor.history import Evaluation
from omninorm.monitor.rules.gradient_spike import GradientSpike
from omninorm.monitor.rules.held_out_rising import HeldOutRising
from omninorm.monitor.rules.loss_rising import LossRising
from omninorm.monitor.rules.no_progress import NoProgress
from omninorm.monitor.rules.suspicious_loss import SuspiciousLoss

pytestmark = pytest.mark.usefixtures("words")
QUIET = {"mean": 3.0, "spread": 0.01}

# Rising training losses -----------------------------------------------------------------------------------------------


def test_loss_that_stays_eight_percent_higher_is_reported_after_25_steps() -> None:
    higher = [3.0] * 100 + [3.25] * 60
    alarms = give_steps(LossRising(), higher)
    # The mean of 10 is 8 % higher once all 10 are; 25 steps later.
    assert alarms[0].step == 100 + 10 + 25
    assert alarms[0].evidence.startswith("Loss rising: ")
    assert numbers_in(alarms[0].evidence) == [10, 3, 100, 3.25]
    assert give_steps(LossRising(), [3.0] * 100 + [3.23] * 60) == []


def test_rise_within_the_noise_is_not_reported() -> None:
    loud, quiet = noise(300, spread=0.4), noise(300, spread=0.05)
    rise = [0.0] * 200 + [0.4] * 100
    assert give_steps(LossRising(), [a + b for a, b in zip(loud, rise, strict=True)]) == []
    assert give_steps(LossRising(), [a + b for a, b in zip(quiet, rise, strict=True)]) != []


def test_loss_that_rose_and_recovered_is_reported_when_it_has() -> None:
    bump = [2.5] * 100 + [3.4] * 20 + [2.5] * 30
    (alarm,) = give_steps(LossRising(), bump)
    assert alarm.evidence.startswith("Loss rose and recovered: between steps ")
    assert numbers_in(alarm.evidence)[2:5] == [10, 2.5, 3.4]
    assert 120 < alarm.step <= 130
    assert "data" in alarm.remedy
    assert give_steps(LossRising(), [2.5] * 100 + [3.4] * 5 + [2.5] * 50) == [], "a spike"
    slowly = [2.5] * 100 + [3.4] * 22 + [3.0 - 0.01 * step for step in range(40)]
    assert [alarm.evidence[:16] for alarm in give_steps(LossRising(), slowly)] == ["Loss rose and re"]


def test_warm_restart_raises_no_alarm() -> None:
    losses = [3.0] * 100 + [3.5] * 60
    lrs = [1e-4] * 100 + [1e-3] * 60
    assert give_steps(LossRising(), losses, lrs=lrs) == []
    assert give_steps(LossRising(), losses, lrs=[1e-4] * 100 + [1.4e-4] * 60) != []


def test_slow_rise_is_compared_with_the_lowest_mean_of_500_steps() -> None:
    rising = [3.0 + 0.001 * step for step in range(500)]
    assert give_steps(LossRising(), rising) != []
    assert give_steps(LossRising(), [3.0 + 0.0004 * step for step in range(2000)]) == [], "6.7 % in 500 steps"


# Held-out losses ------------------------------------------------------------------------------------------------------


def evaluate(losses: Sequence[float], training: Sequence[float] | None = None) -> list[list[Alarm]]:
    """Return the reports about evaluations after every 100 steps, whose training losses are given."""
    rule, history, reports = HeldOutRising(), History(facts=facts()), []
    for number, loss in enumerate(losses, start=1):
        if training is not None:
            history.steps.extend(Step(100 * number - 19 + at, training[number - 1], math.nan, 1e-3) for at in range(20))
        history.evaluations.append(Evaluation(100 * number, "eval", loss))
        reports.append(list(rule.on_evaluation(history, history.evaluations[-1])))
    return reports


def test_held_out_loss_that_rises_three_times_is_overfitting() -> None:
    reports = evaluate([3.0, 2.5, 2.52, 2.55, 2.6], [3.0, 2.4, 2.2, 2.0, 1.8])
    assert [len(alarms) for alarms in reports] == [0, 0, 0, 0, 1]
    (alarm,) = reports[-1]
    assert (alarm.severity, alarm.rule, alarm.layer) == ("warn", "held-out-rising", None)
    assert alarm.evidence.startswith("Overfitting: ")
    assert numbers_in(alarm.evidence) == [2.5, 200, 2.6, 500, 2.4, 1.8]
    assert "step 200" in alarm.remedy


@pytest.mark.parametrize(
    ("losses", "training"),
    [
        ([2.5, 2.51, 2.52, 2.549], [2.0] * 4),  # 2.0 %
        ([2.5, 2.6, 2.7], [2.0] * 3),  # two rises
        ([2.5, 2.6, 2.55, 2.7], [2.0] * 4),  # not each
        ([2.5, 2.6, 2.7, 2.8], [2.0, 2.1, 2.2, 2.3]),  # the training loss rises as well
    ],
)
def test_held_out_losses_that_are_not_overfitting(losses: list[float], training: list[float]) -> None:
    assert evaluate(losses, training)[-1] == []


def test_held_out_loss_without_training_losses() -> None:
    (alarm,) = evaluate([2.5, 2.6, 2.7, 2.8])[-1]
    assert "each of the last 3 evaluations" in alarm.evidence


def test_held_out_losses_of_several_names_are_kept_apart() -> None:
    rule, history, found = HeldOutRising(), History(facts=facts()), []
    for number in range(1, 6):
        for name, loss in (("books", 2.5 + 0.05 * number), ("code", 2.5 - 0.05 * number)):
            history.evaluations.append(Evaluation(100 * number, name, loss))
            found += list(rule.on_evaluation(history, history.evaluations[-1]))
    assert len(found) == 2
    assert all("'books'" in alarm.evidence for alarm in found)


# Losses that are too good ---------------------------------------------------------------------------------------------


def falling(to: float, first: float = 5.5, logz: float | None = 5.5, steps: int = 60) -> list[Alarm]:
    """Return the reports about a loss that falls to a tenth of its first value or not, with log Z of the first sample."""
    history, rule = History(facts=facts()), SuspiciousLoss()
    if logz is not None:
        history.samples.append(Sample(1, {"logz_mean": [logz]}))
    return give_steps(rule, [first, *[to] * steps], history=history)


def test_loss_below_a_tenth_of_its_first_value_is_suspicious() -> None:
    alarms = falling(0.54)
    assert (alarms[0].severity, alarms[0].step) == ("warn", 6)
    assert numbers_in(alarms[0].evidence) == [5.5, 0.54, 6]
    assert falling(0.56) == []


@pytest.mark.parametrize(
    ("first", "logz"),
    [(5.5, None), (3.4, 3.4), (2.0, 11.0), (5.5, 8.0), (42.0, 42.0)],
    ids=["no logits", "tiny", "tuned", "trained", "large weights"],
)
def test_other_losses_may_fall_to_zero(first: float, logz: float | None) -> None:
    assert falling(0.001, first, logz) == []


def test_loss_may_become_small_after_200_steps() -> None:
    history, rule = History(facts=facts()), SuspiciousLoss()
    history.samples.append(Sample(1, {"logz_mean": [5.5]}))
    assert give_steps(rule, [*[5.5] * 200, *[0.01] * 50], history=history) == []


# Updates that become tiny ---------------------------------------------------------------------------------------------


def after_learning(update: float, lr: float = 1e-3, losses: Sequence[float] | None = None) -> list[Alarm]:
    """Return the reports about samples of a run that learned for 100 steps, with these updates from then on."""
    history, rule = History(facts=facts()), NoProgress()
    losses = losses or [*[5.0 - 0.02 * step for step in range(100)], *[3.0] * 100]
    found: list[Alarm] = []
    for step, loss in enumerate(losses, start=1):
        late = step > 100
        history.steps.append(Step(step, loss, 1.0, lr if late else 1e-3))
        found += rule.on_step(history, history.steps[-1])
        if step % 10 == 0:
            history.samples.append(Sample(step, rates(update if late else 1e-2, 0.1)))
            found += rule.on_sample(history, history.samples[-1])
    return found


def test_updates_that_shrink_tenfold_after_learning_are_reported() -> None:
    (alarm, *_) = after_learning(0.9e-3)
    assert alarm.evidence.startswith("Updates have shrunk 11.1-fold: from 0.01 to 0.0009 of the weights")
    assert after_learning(1.1e-3) == []
    assert after_learning(0.9e-3, lr=4e-4) == [], "the learning rate fell as well"
    assert after_learning(1e-2) == [], "a plateau"
    still_falling = [5.0 - 0.02 * step for step in range(200)]
    assert after_learning(0.9e-3, losses=still_falling) == []


def test_small_updates_from_the_beginning_are_named_as_the_cause() -> None:
    for update, small in ((5e-5, True), (3e-4, False)):
        history, rule = History(facts=facts()), NoProgress()
        history.samples.extend(Sample(step, rates(update, 0.1)) for step in (10, 20, 30))
        alarms = give_steps(rule, noise(80), history=history)
        assert alarms[0].evidence.startswith("Updates are only 5e-05") is small


def test_accumulated_losses_are_named_at_gradient_spikes() -> None:
    for passes in (1, 4):
        norms = [*[1.0] * 80, 10.0, *[1.0] * 10, 10.0, 10.0, 10.0]
        history = History(facts=facts(), passes=passes)
        (alarm,) = give_steps(GradientSpike(), [3.0] * len(norms), norms, history=history)
        assert ("4 accumulation steps" in alarm.remedy) is (passes == 4)


# Real runs ------------------------------------------------------------------------------------------------------------


def test_shuffled_labels_for_thirty_steps_are_reported_as_a_data_problem() -> None:
    now = [0]

    def count(model: nn.Module, optimizers: object, step: int) -> None:
        now[0] = step

    def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
        if 61 <= now[0] <= 90:
            tokens = torch.stack([row[torch.randperm(SEQ + 1)] for row in tokens])
        return next_token_loss(model, tokens)

    torch.manual_seed(0)
    watched, losses = train_tiny(TinyGPT(), steps=120, before=count, loss_of=loss_of)
    assert min(losses[65:85]) > min(losses[50:60])
    (alarm,) = of_rule(watched, "loss-rising")
    assert "step 60" in alarm.evidence
    assert "data" in alarm.remedy


def test_labels_that_are_not_shifted_are_suspicious() -> None:
    def unshifted(model: nn.Module, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(tokens[:, 1:]).flatten(0, 1), tokens[:, 1:].flatten())

    torch.manual_seed(0)
    watched, losses = train_tiny(TinyGPT(), lr=4e-3, steps=100, loss_of=unshifted)
    assert losses[-1] < 0.1 * losses[0]
    assert named(of_rule(watched, "suspicious-loss")) == [("warn", "suspicious-loss", None)]


def test_overfitting_is_reported_from_log_eval() -> None:
    torch.manual_seed(0)
    model = TinyGPT(width=32, blocks=2)
    few = torch.randint(VOCAB, (BATCH, SEQ + 1))
    other = torch.randint(VOCAB, (BATCH, SEQ + 1))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    with watch(model, optimizer) as watched:
        for step in range(1, 121):
            loss = next_token_loss(model, few)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
            if step % 20 == 0:
                with torch.no_grad():
                    watched.log_eval(next_token_loss(model, other), name="held out")
    assert [alarm.severity for alarm in of_rule(watched, "held-out-rising")] == ["warn"]
    events = [event for event in watched.record if event["kind"] == "evaluation"]
    assert [event["step"] for event in events] == [20, 40, 60, 80, 100, 120]
    assert {event["name"] for event in events} == {"held out"}
    assert events[-1]["loss"] > events[0]["loss"]


def test_log_eval_does_not_change_the_samples_or_the_weights() -> None:
    def train(evaluate: bool) -> tuple[list[Tensor], list[int], list[int]]:
        torch.manual_seed(0)
        model = TinyGPT(width=16, blocks=1)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        tokens = torch.randint(VOCAB, (2, SEQ + 1))
        with watch(model, optimizer, every=5, rules=[]) as watched:
            for _ in range(12):
                loss = next_token_loss(model, tokens)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                watched.step(loss)
                if evaluate:
                    watched.log_eval(1.0)
        history = watched.history
        return list(model.parameters()), [s.step for s in history.samples], [s.step for s in history.steps]

    weights, samples, steps = train(evaluate=True)
    expected = train(evaluate=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected[0], strict=True))
    assert (samples, steps) == expected[1:] == ([1, 5, 10], list(range(1, 13)))


def test_log_eval_refuses_what_is_not_a_loss() -> None:
    model = TinyGPT(width=16, blocks=1)
    with watch(model) as watched:
        with pytest.raises(InputError):
            watched.log_eval("high")  # type: ignore[arg-type]
        with pytest.raises(InputError):
            watched.log_eval(None)  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            watched.log_eval(1.0, step=-1)
        watched.log_eval(torch.tensor([1.0, 3.0]), step=7)
        assert list(watched.history.evaluations) == [Evaluation(7, "eval", 2.0)]
    with pytest.raises(RunError):
        watched.log_eval(1.0)


def test_backward_passes_per_step_are_counted() -> None:
    torch.manual_seed(0)
    watched, _ = train_tiny(TinyGPT(width=16, blocks=1), steps=3, passes=3, rules=[])
    assert watched.history.passes == 3
    watched, _ = train_tiny(TinyGPT(width=16, blocks=1), steps=3, rules=[])
    assert watched.history.passes == 1


def test_tiny_sgd_updates_are_named_although_the_loss_falls_a_little() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    watched, losses = train_tiny(model, torch.optim.SGD(model.parameters(), 1e-4), steps=65, clip=None)
    assert 0.95 * losses[0] < losses[-1] < 0.995 * losses[0]
    (alarm,) = of_rule(watched, "no-progress")
    assert alarm.evidence.startswith("Updates are only")


def test_long_warm_up_raises_no_alarm_about_small_updates() -> None:
    torch.manual_seed(0)

    def warm_up(model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
        optimizers[0].param_groups[0]["lr"] = 2e-6 * step

    watched, _ = train_tiny(TinyGPT(), steps=70, before=warm_up)
    assert named(watched.alarms) == []
