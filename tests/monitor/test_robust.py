"""Copies of monitored models, replaced functions, internal errors, and numbers at the limits of float32."""

import copy
import io
import math
import warnings
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from helpers.histories import numbers_in
from torch import Tensor, nn

from omninorm.errors import ConfigError
from omninorm.monitor import watch
from omninorm.monitor.probes.attention import AttentionProbe

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 1)  # declared first, and last to run
        self.stem = nn.Linear(3, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = model(torch.ones(4, 5, 3)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def test_copies_of_the_model_are_not_monitored() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer, every=1, rules=[]) as watched:
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        twin(1e4 * torch.ones(4, 5, 3)).sum().backward()
        watched.step(step(model, optimizer))
    assert watched.history.samples[0].signals["stream_max"][0] < 100  # type: ignore[operator]
    twin(torch.ones(4, 5, 3)).sum().backward()  # with hooks that do nothing


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norm(x))[:, None].chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


def attending() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Sequential(Attending(), Attending()), nn.Linear(WIDTH, 1))


def test_attention_replaced_by_the_user_is_called_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def mine(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        calls.append(is_causal)
        return value / 2

    monkeypatch.setattr(F, "scaled_dot_product_attention", mine)
    model = attending()
    expected = model(torch.ones(4, 5, 3))
    with watch(model, every=1, rules=[]) as watched:
        y = model(torch.ones(4, 5, 3))
        y.square().mean().backward()
        watched.step(y.mean())
    assert torch.equal(y, expected)
    assert calls == [True] * 4
    assert F.scaled_dot_product_attention is mine
    assert watched.history.samples[0].signals["attention_entropy"][0] is not None


def test_attention_replaced_during_a_watch_is_kept_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, softmax = F.scaled_dot_product_attention, F.softmax
    for owner, name in ((F, "scaled_dot_product_attention"), (torch, "softmax")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back at the end, whatever comes
    model = attending()
    with watch(model, every=1, rules=[]):
        ours = F.scaled_dot_product_attention
        assert ours is not attention

        def theirs(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        for owner, name in ((F, "scaled_dot_product_attention"), (torch, "softmax")):
            monkeypatch.setattr(owner, name, theirs)
    assert F.scaled_dot_product_attention is theirs
    assert torch.softmax is theirs
    assert F.softmax is softmax
    assert "softmax" not in vars(Tensor)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # another watch hears each attention once, although what was put there still calls the wrapper of the first
    heard, see = [], AttentionProbe.see
    monkeypatch.setattr(AttentionProbe, "see", lambda site, *seen: heard.append(site) or see(site, *seen))
    with watch(model, every=1, rules=[]) as watched:
        y = model(torch.ones(4, 5, 3))
        y.square().mean().backward()
        watched.step(y.mean())
    assert watched.history.samples[0].signals["attention_entropy"][0] is not None
    assert len(heard) == 2


def test_record_that_cannot_be_closed_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    watched = watch(model, every=1, rules=[]).open()

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(watched, "flush", fail)
    with pytest.raises(ZeroDivisionError):
        watched.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with watch(model, every=1, rules=[]):  # it can be watched again
        pass


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"optimizer": 0.1}, r"torch\.optim\.Optimizer, got float"), ({"sinks": 1}, "sinks"), ({"rules": 3}, "rules")],
)
def test_arguments_that_are_no_lists_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        watch(Model(), **wrong)


def test_numpy_scalars_are_accepted_as_losses() -> None:
    with watch(Model(), every=1, rules=[]) as watched:
        watched.step(numpy.float32(1.5))
    assert watched.history.steps[-1].loss == 1.5


def test_gradient_norms_beyond_float32_are_finite() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e25
    with watch(model, optimizer, every=1, rules=[]) as watched:
        loss = model(torch.ones(4, 5, 3)).mean() * 1e-3
        loss.backward()
        optimizer.step()
        watched.step(loss.detach())
    assert watched.history.nonfinite is None
    assert 1e19 < watched.history.steps[0].grad_norm < math.inf


@pytest.mark.parametrize(("broken", "named"), [("stem", "stem"), ("head", "head"), ("blocks.1.down", "blocks.1.down")])
def test_nan_is_located_at_the_first_module_that_ran(broken: str, named: str) -> None:
    model = Model()
    with torch.no_grad():
        model.get_submodule(broken).weight[0, 0] = torch.nan
    with watch(model, every=10, rules=[]) as watched:
        watched.step(model(torch.ones(4, 5, 3)).sum())
    assert watched.history.nonfinite is not None
    assert (watched.history.nonfinite.phase, watched.history.nonfinite.layer) == ("forward", named)


def test_gradients_of_parameters_unfrozen_later_are_measured() -> None:
    """Everything is frozen when the watch begins, so that no hook announces a backward pass."""
    model = Model().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer, every=10, rules=[]) as watched:
        model.stem.requires_grad_(True)
        watched.step(step(model, optimizer))
    assert watched.history.steps[0].grad_norm > 0


def test_internal_error_does_not_hide_the_users_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    watched = watch(model, every=1, rules=[])

    def loop() -> None:
        with watched:
            monkeypatch.setattr(watched._buffer, "take", lambda *args: 1 / 0)
            watched.step(1.0)
            raise KeyError("theirs")

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(KeyError, match="theirs"):
            loop()
    assert sum("ZeroDivisionError" in str(warning.message) for warning in warned) == 1
    assert not any(module._forward_hooks for module in model.modules())
    assert watched.record[-1]["reason"] == "KeyError: 'theirs'"


def test_ring_buffer_is_limited_for_long_intervals() -> None:
    model = Model()
    with watch(model, every=100_000, rules=[]) as watched:
        for _ in range(600):
            watched.step(1.0)
        assert watched._buffer._ring.shape[0] <= 256
    assert [point.step for point in watched.history.steps] == list(range(1, 601))


def test_parameters_in_no_optimizer_raise_a_warning() -> None:
    model = Model()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if not name.startswith("head")], lr=0.01)
    with watch(model, optimizer, rules=[]) as watched:
        watched.step(step(model, optimizer))
    (alarm,) = watched.alarms
    assert (alarm.rule, alarm.severity, alarm.layer) == ("optimizer-coverage", "warn", "head")
    assert numbers_in(alarm.evidence) == [2, 12]
    assert alarm.evidence.endswith("in no optimizer: all of head.")
    with watch(model, torch.optim.SGD(Model().parameters(), lr=0.01), rules=[]) as watched:
        pass
    assert "holds no trainable parameter of this model" in watched.alarms[0].evidence
    with watch(model, rules=[]) as watched:
        pass
    assert watched.alarms == []


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (("h.0.", "h.1.norm.weight"), "all of h.0, h.1.norm.weight"),
        (("h.",), "all of h"),
        (("h.0.norm", "h.1.norm", "h.1.up", "h.1.out.bias"), "all of h.0.norm, all of h.1.norm, all of h.1.up and 1 more"),
        (("head.weight",), "head.weight"),
    ],
)  # fmt: skip
def test_parameters_in_no_optimizer_are_named_by_whole_modules(missing: tuple[str, ...], text: str) -> None:
    part = lambda: nn.ModuleDict({"norm": nn.LayerNorm(4), "up": nn.Linear(4, 4), "out": nn.Linear(4, 4)})  # noqa: E731
    model = nn.ModuleDict({"h": nn.ModuleList([part(), part()]), "head": nn.Linear(4, 4, bias=False)})
    model["h"][0]["out"].requires_grad_(False)  # type: ignore[index]
    optimizer = torch.optim.SGD(p for name, p in model.named_parameters() if not name.startswith(missing))
    with watch(model, optimizer, rules=[]) as watched:
        pass
    assert watched.alarms[0].evidence.endswith(f"in no optimizer: {text}.")


@pytest.mark.parametrize("wrong", [{"folder": 3}, {"scaler": "x"}, {"sinks": "tb"}, {"sinks": [None]}])
def test_invalid_folder_scaler_and_sinks_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        watch(Model(), **wrong)  # type: ignore[arg-type]
