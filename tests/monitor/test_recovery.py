"""What an error inside the monitor may cost: one statistic, and never a hook, a step or the training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.watched_models import Decoder, adamw, some_tokens, token_loss, train_watched
from torch import Tensor, nn

from omninorm.errors import ConfigError
from omninorm.monitor import watch
from omninorm.monitor.checks.collect import Checks
from omninorm.monitor.probes.optimizer import OptimizerWatch


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder()


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer without calling Optimizer.__init__, as many implementations do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}


def test_optimizer_without_hooks_is_refused_in_one_sentence() -> None:
    model = decoder()
    with pytest.raises(ConfigError, match="hooks on its steps, got Lookahead"):
        watch(model, Lookahead(adamw(model)))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("owner", [OptimizerWatch, Checks])
def test_watch_that_cannot_be_opened_leaves_nothing(
    owner: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = decoder()
    optimizer = adamw(model)
    softmax, step_hooks = Tensor.softmax, len(optimizer._optimizer_step_pre_hooks)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(owner, "attach", fail)
    with pytest.raises(ZeroDivisionError):
        watch(model, optimizer, folder=tmp_path).open()
    assert hooks_of(model) == 0
    assert Tensor.softmax is softmax
    assert len(optimizer._optimizer_step_pre_hooks) == step_hooks
    monkeypatch.undo()
    with watch(model, optimizer):
        pass


class Came(torch.optim.SGD):
    """Has a pair of ε beside its betas, and the state of Adam."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-3)
        for group in self.param_groups:
            group |= {"eps": (1e-30, 1e-16), "betas": (0.9, 0.999, 0.9999)}
            for parameter in group["params"]:
                self.state[parameter] = {"exp_avg_sq": torch.ones_like(parameter), "step": torch.tensor(1.0)}


def test_optimizer_with_a_pair_of_eps_is_watched() -> None:
    model = decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watched = train_watched(model, Came(model.parameters()), 2)
    assert watched.history.facts.adam_eps is None
    assert "update_ratio" in watched.history.samples[-1].signals
    assert "adam_ratio" not in watched.history.samples[-1].signals


def test_eps_on_the_host_is_read() -> None:
    model = decoder()
    optimizer = adamw(model)
    optimizer.param_groups[0]["eps"] = torch.tensor(1e-6)
    assert train_watched(model, optimizer, 1).history.facts.adam_eps == pytest.approx(1e-6)


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    original, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.filterwarnings("ignore:omninorm.watch could not measure")
@pytest.mark.parametrize("name", ["of_steps", "of_sample"])
def test_error_while_judging_does_not_shift_later_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    fail_once(monkeypatch, Checks, name)
    optimizer = adamw(model)
    with watch(model, optimizer, every=2, rules=[]) as watched:
        for step in range(1, 9):
            optimizer.param_groups[0]["lr"] = step * 1e-4
            token_loss(model, some_tokens(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(float(step))
    later = [step for step in watched.history.steps if step.step > 3]
    assert [step.step for step in later] == [4, 5, 6, 7, 8][len([4, 5, 6, 7, 8]) - len(later) :]
    assert {8, 7, 6, 5} <= {step.step for step in later}
    assert all(step.loss == step.step and step.lr == pytest.approx(step.step * 1e-4) for step in watched.history.steps)


@pytest.mark.filterwarnings("ignore:omninorm.watch could not measure")
def test_store_that_is_gone_costs_only_the_check_of_replicas() -> None:
    class Gone:
        def measure(self) -> Tensor:
            return torch.zeros(2)

        def exchange(self, step: int, sums: object) -> object:
            raise ConnectionError

    model = decoder()
    optimizer = adamw(model)
    with watch(model, optimizer, every=1, rules=[]) as watched:
        watched._checks._replicas = Gone()  # type: ignore[assignment]
        for step in range(1, 4):
            loss = token_loss(model, some_tokens(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    assert [sample.step for sample in watched.history.samples] == [1, 2, 3]
    assert all(sample.checks is not None and sample.checks.replicas == () for sample in watched.history.samples)


def test_frozen_parameter_of_8_bits_is_measured() -> None:
    model = decoder()
    matrix = torch.randn(8, 8).to(torch.float8_e4m3fn)
    model.register_parameter("cache", nn.Parameter(matrix, requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watched = train_watched(model, adamw(model), 2)
    group = next(at for at, name in enumerate(watched.history.facts.groups) if "cache" in name)
    size = watched.history.samples[-1].signals["weight_rms"][group]
    assert size == pytest.approx(matrix.float().square().mean().sqrt().item(), rel=1e-6)


def test_failed_measurement_is_the_only_one_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    model = decoder()
    for name, missing in (("measure_gains", "gain_max"), ("measure_matrices", "weight_rms")):
        monkeypatch.setattr(f"omninorm.monitor.probes.weights.{name}", fail)
        with pytest.warns(UserWarning, match="ZeroDivisionError") as warned:
            watched = train_watched(model, adamw(model), 3)
        monkeypatch.undo()
        assert sum("could not measure" in str(warning.message) for warning in warned) == 1
        seen = watched.history.samples[-1].signals
        assert missing not in seen
        assert {"stream_rms", "update_ratio", "adam_ratio"} <= set(seen)
