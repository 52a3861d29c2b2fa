"""Exact checks in loops that compute, keep or replace gradients and weights in unusual but correct ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.watched_models import Decoder, adamw, some_tokens, token_loss
from torch import Tensor, nn
from torch.nn.utils import prune

from omninorm.monitor import Alarm, Watch, watch
from omninorm.monitor.checks import checksum as checksums
from omninorm.monitor.checks import replicas

RULES = ("no-gradient", "gradients-not-cleared", "updates-lost", "stale-parameters", "gradient-clipped")


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(blocks=3)


def train(
    model: nn.Module, optimizers: Any, body: Callable[[int, Watch], Tensor | None], steps: int = 12, every: int = 3
) -> list[Alarm]:
    """Call `body`, the user's code, in every step, and return the alarms of the exact rules."""
    with watch(model, optimizers, every=every) as watched:
        for step in range(1, steps + 1):
            watched.step(body(step, watched))
    return [alarm for alarm in watched.alarms if alarm.rule in RULES]


def with_closure(model: nn.Module, optimizer: torch.optim.Optimizer, to_none: bool) -> Callable[[int, Watch], Tensor]:
    """Return a body that clears the gradients and computes them in a closure."""

    def body(step: int, watched: Watch) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=to_none)
            loss = token_loss(model, some_tokens(step))
            loss.backward()
            return loss

        optimizer.zero_grad(set_to_none=to_none)
        return optimizer.step(closure)  # type: ignore[arg-type, return-value]

    return body


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_closure_is_not_taken_for_cleared_gradients(kind: Any, to_none: bool) -> None:
    model = decoder()
    optimizer = kind(model.parameters(), lr=1e-2)
    assert train(model, optimizer, with_closure(model, optimizer, to_none)) == []


def test_gradient_of_an_earlier_step_is_not_compared_with_that_of_a_closure() -> None:
    model = decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def body(step: int, watched: Watch) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = token_loss(model, some_tokens(step)) * 10.0**step
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            return loss

        return optimizer.step(closure).detach()  # type: ignore[arg-type, union-attr]

    with watch(model, optimizer, every=1) as watched:
        for step in range(1, 5):
            watched.step(body(step, watched))
            assert watched.history.samples[-1].checks.norms is None


def test_master_weights_outside_the_model_are_not_foreign() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = decoder().to(dtype)
        masters = [parameter.detach().float().clone().requires_grad_() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(masters, lr=0.1)

        def body(step: int, watched: Watch, model: Any = model, masters: Any = masters, it: Any = optimizer) -> Tensor:
            loss = token_loss(model, some_tokens(step))
            loss.backward()
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
            it.step()
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.data.copy_(master.data)
            return loss.detach()

        assert [alarm.rule for alarm in train(model, optimizer, body) if alarm.rule == "stale-parameters"] == []


def test_gradients_of_autograd_grad_are_seen() -> None:
    model = decoder()
    optimizer = adamw(model)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(step))
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    with watch(model, optimizer, every=3) as watched:
        for step in range(1, 7):
            watched.step(body(step, watched))
    assert [alarm for alarm in watched.alarms if alarm.rule in RULES] == []
    assert all(step.grad_norm > 0 for step in watched.history.steps)


def ordinary(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Callable[[int, Watch], Tensor]:
    """Return the body of an ordinary loop, in which the optimizers step together."""

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(step))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return body


def test_renamed_parameter_is_not_stale() -> None:
    model = decoder()
    optimizer = adamw(model)
    usual = ordinary(model, optimizer)

    def body(step: int, watched: Watch) -> Tensor:
        if step == 4:
            prune.l1_unstructured(model.blocks[1].feed_forward.up, "weight", 0.3)
        return usual(step, watched)

    assert train(model, optimizer, body) == []


@pytest.mark.parametrize("turns", ["together", "alternately"])
def test_lost_updates_of_two_optimizers_are_named(turns: str) -> None:
    model = decoder().bfloat16()
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD(parameters[::2], lr=1e-5), torch.optim.SGD(parameters[1::2], lr=1e-5)]
    usual = ordinary(model, *optimizers)
    alternating = [ordinary(model, optimizer) for optimizer in optimizers]
    body = usual if turns == "together" else lambda step, watched: alternating[step % 2](step, watched)
    assert "updates-lost" in [alarm.rule for alarm in train(model, optimizers, body, steps=45, every=5)]


def test_lost_updates_are_named_beside_a_parameter_of_one_element() -> None:
    model = decoder().bfloat16()
    model.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))
    model.head.register_forward_hook(lambda module, args, output: output * model.scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    alarms = train(model, optimizer, ordinary(model, optimizer), steps=30, every=5)
    assert [alarm.rule for alarm in alarms] == ["updates-lost"]


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_forgotten_zero_grad_is_named_if_every_micro_batch_is_a_step(micro_batches: int) -> None:
    model = decoder()
    optimizer = adamw(model)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(step))
        loss.backward()
        if step % micro_batches == 0:
            optimizer.step()
        return loss.detach()

    assert "gradients-not-cleared" in [alarm.rule for alarm in train(model, optimizer, body)]


def test_parameters_replaced_in_model_and_optimizer_are_not_without_a_gradient() -> None:
    model = decoder()
    optimizer = adamw(model.blocks)
    usual = ordinary(model, optimizer)

    def body(step: int, watched: Watch) -> Tensor:
        if step == 4:
            for module in model.blocks.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.detach().clone()))
            optimizer.param_groups[0]["params"] = list(model.blocks.parameters())
        return usual(step, watched)

    assert {alarm.rule for alarm in train(model, optimizer, body, every=20)} <= {"stale-parameters"}


def test_parts_that_take_turns_in_one_optimizer_are_not_without_a_gradient() -> None:
    """The optimizer's parameters are replaced by as many others of the model."""
    model = decoder()
    parts = [list(block.parameters()) for block in model.blocks]
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(parts[0], lr=1e-2)
    usual = ordinary(model, optimizer)

    def body(step: int, watched: Watch) -> Tensor:
        if step == 4:
            optimizer.param_groups[0]["params"] = parts[2]
            model.zero_grad()
            model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
        return usual(step, watched)

    assert [alarm for alarm in train(model, optimizer, body) if alarm.rule == "no-gradient"] == []


def test_hooks_keep_nothing_of_earlier_backward_passes() -> None:
    model = decoder()
    optimizer = adamw(model)
    body = ordinary(model, optimizer)
    with watch(model, optimizer, every=5) as watched:
        for step in range(1, 9):
            watched.step(body(step, watched))
        hooks = [hook for p in model.parameters() for hook in (p._backward_hooks or {}).values()]
        cells = [cell.cell_contents for hook in hooks for cell in getattr(hook, "__closure__", None) or ()]
    assert hooks
    assert max((len(kept) for kept in cells if isinstance(kept, dict)), default=0) <= 1


def test_replicas_agree_on_the_run_although_one_opened_more_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = dist.HashStore(), [0]
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(replicas, "rank", lambda: now[0])
    monkeypatch.setattr(replicas, "world_size", lambda: 2)
    model = decoder()
    named = list(model.named_parameters())

    def at(rank: int, call: Callable[[], Any]) -> Any:
        now[0] = rank
        return call()

    def opened() -> replicas.Replicas:
        return replicas.Replicas(model, named, {"all": range(len(named))})

    for extra in (0, 1):
        at(extra, opened)
        other, first = at(1, opened), at(0, opened)
        for step in (1, 2):
            at(1, lambda step=step, other=other: other.exchange(step, [1.0]))
            found = at(0, lambda step=step, first=first: first.exchange(step, [2.0]))
            assert [replica.rank for replica in found] == [1]


def test_checksum_of_tensors_on_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[list[Tensor]] = []

    def of_device(tensors: list[Tensor], most: int) -> Tensor:
        parts.append(tensors)
        return torch.tensor(float(len(tensors)), dtype=torch.float64)

    monkeypatch.setattr(checksums, "_of_device", of_device)
    here, there = torch.ones(2), torch.ones(2, device="meta")
    assert float(checksums.checksum([here, there, here])) == 3
    assert [len(part) for part in parts] == [2, 1]
