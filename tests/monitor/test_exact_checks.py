"""Real small trainings with a fault in the training loop, and healthy loops that resemble them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.watched_models import WIDTH, Decoder, adamw, some_tokens, token_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omninorm.monitor import Alarm, Watch, watch
from omninorm.record.alarm import leading, roots

RULES = (
    "no-gradient", "gradients-not-cleared", "learning-rate-zero", "updates-lost", "steps-skipped", "stale-parameters",
    "gradient-clipped", "replicas-differ", "identical-batches",
)  # fmt: skip
STEPS, EVERY = 30, 5
Found = list[tuple[str, str, str | None, int]]


def decoder(blocks: int = 4) -> Decoder:
    torch.manual_seed(0)
    return Decoder(blocks=blocks)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer] | None,
    body: Callable[[int, Watch], Tensor | None],
    steps: int = STEPS,
    every: int = EVERY,
    **options: Any,
) -> list[Alarm]:
    """Call `body`, the user's code, in every step, and return the alarms of the exact rules."""
    with watch(model, optimizer, every=every, **options) as watched:
        for step in range(1, steps + 1):
            watched.step(body(step, watched))
    return [alarm for alarm in watched.alarms if alarm.rule in RULES]


def ordinary(
    model: nn.Module, optimizer: torch.optim.Optimizer, before: Callable[[int], None] = lambda step: None
) -> Callable[[int, Watch], Tensor]:
    """Return the body of an ordinary loop, which calls `before` first."""

    def body(step: int, watched: Watch) -> Tensor:
        before(step)
        loss = token_loss(model, some_tokens(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return body


def first_of(alarms: Iterable[Alarm], severity: str = "fail") -> tuple[str, str | None, int]:
    """Return rule, layer and step of the first alarm of this severity; there must not be another rule's alarm."""
    alarms = list(alarms)
    assert len({alarm.rule for alarm in alarms}) == 1, alarms
    alarm = next(alarm for alarm in alarms if alarm.severity == severity)
    return alarm.rule, alarm.layer, alarm.step


# no-gradient ----------------------------------------------------------------------------------------------------------


def detach_input(model: Decoder, at: int) -> None:
    model.blocks[at].register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))


def test_detached_input_of_a_block_names_the_blocks_before_it() -> None:
    model = decoder()
    detach_input(model, 2)
    optimizer = adamw(model)
    alarms = train(model, optimizer, ordinary(model, optimizer))
    assert first_of(alarms) == ("no-gradient", "blocks.1", 2)
    assert "embedding, blocks.0 and blocks.1 since step 1 (33 parameters)" in alarms[0].evidence
    assert "blocks.2 gets one" in alarms[0].evidence


@pytest.mark.parametrize("part", ["feed_forward", "attention"])
def test_detached_sublayer_is_named(part: str) -> None:
    model = decoder()
    getattr(model.blocks[1], part).register_forward_hook(lambda module, args, output: output.detach())
    optimizer = adamw(model)
    assert first_of(train(model, optimizer, ordinary(model, optimizer))) == ("no-gradient", f"blocks.1.{part}", 2)


class Core(nn.Module):
    """The queries, keys and values of an attention, in a module of their own, as in BERT."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v = attention.q, attention.k, attention.v


@pytest.mark.parametrize(("names", "layer", "step"), [("qkv", "core", 2), ("q", "core.q", 20)])
def test_detached_part_of_an_attention_is_named(names: str, layer: str, step: int) -> None:
    model = decoder()
    for block in model.blocks:
        block.attention.core = Core(block.attention)
        for name in "qkv":
            delattr(block.attention, name)
            block.attention.__dict__[name] = getattr(block.attention.core, name)
    for name in names:
        getattr(model.blocks[1].attention.core, name).register_forward_hook(
            lambda module, args, output: output.detach()
        )
    optimizer = adamw(model)
    (alarm,) = train(model, optimizer, ordinary(model, optimizer))
    assert (alarm.rule, alarm.layer, alarm.step) == ("no-gradient", f"blocks.1.attention.{layer}", step)
    assert alarm.severity == ("fail" if step == 2 else "warn")


def test_part_detached_during_the_run_is_named_at_the_next_sample() -> None:
    model = decoder()
    optimizer = adamw(model)

    def before(step: int) -> None:
        if step == 12:
            model.blocks[2].feed_forward.register_forward_hook(lambda module, args, output: output.detach())

    assert first_of(train(model, optimizer, ordinary(model, optimizer, before))) == (
        "no-gradient", "blocks.2.feed_forward", 13,
    )  # fmt: skip


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("every", [1, 5, 50])
def test_block_that_returns_its_input_is_named_whatever_every_is(at: int, every: int) -> None:
    model = decoder()
    model.blocks[at].forward = lambda x, mask=None: x
    optimizer = adamw(model)
    alarms = train(model, optimizer, ordinary(model, optimizer), every=every)
    assert (alarms[0].rule, alarms[0].severity, alarms[0].layer, alarms[0].step) == (
        "no-gradient", "fail", f"blocks.{at}", 10,
    )  # fmt: skip
    assert {alarm.cause for alarm in alarms[1:]} <= {alarms[0].ref}


def test_block_that_is_skipped_later_takes_longer() -> None:
    model = decoder()

    def before(step: int) -> None:
        if step == 5:
            model.blocks[2].forward = lambda x, mask=None: x

    optimizer = adamw(model)
    alarms = train(model, optimizer, ordinary(model, optimizer, before), steps=40, every=50)
    assert first_of(alarms) == ("no-gradient", "blocks.2", 34)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_behind_a_frozen_embedding_is_named() -> None:
    model = decoder()
    model.embedding.requires_grad_(False)
    model.around = lambda block, x, mask: checkpoint(block, x, mask, use_reentrant=True)
    optimizer = adamw(model)
    assert first_of(train(model, optimizer, ordinary(model, optimizer))) == ("no-gradient", "blocks.3", 2)


def test_detached_last_blocks_and_embeddings_are_a_warning() -> None:
    model = decoder()
    model.blocks[3].attention.register_forward_hook(lambda module, args, output: output.detach())
    model.blocks[3].feed_forward.register_forward_hook(lambda module, args, output: output.detach())
    optimizer = adamw(model)
    assert first_of(train(model, optimizer, ordinary(model, optimizer)), "warn") == ("no-gradient", "blocks.3", 5)
    model = decoder()
    model.embedding.register_forward_hook(lambda module, args, output: output.detach())
    optimizer = adamw(model)
    assert first_of(train(model, optimizer, ordinary(model, optimizer)), "warn") == ("no-gradient", "embedding", 5)


def test_detached_layers_of_a_model_without_blocks_are_named() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    model[2].register_forward_hook(lambda module, args, output: output.detach())
    optimizer = adamw(model)

    def body(step: int, watched: Watch) -> Tensor:
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    assert first_of(train(model, optimizer, body)) == ("no-gradient", "2", 2)


def test_forgotten_backward_is_named() -> None:
    model = decoder()
    optimizer = adamw(model)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(step))
        optimizer.step()
        return loss.detach()

    alarms = train(model, optimizer, body)
    assert first_of(alarms) == ("no-gradient", None, 3)
    assert alarms[0].evidence.startswith("No gradient arrived in the last 3 steps")


@pytest.mark.parametrize(("to_none", "step"), [(True, 2), (False, 5)])
def test_gradients_cleared_before_the_optimizer_step_are_named(to_none: bool, step: int) -> None:
    model = decoder()
    optimizer = adamw(model)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(step))
        loss.backward()
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.step()
        return loss.detach()

    alarms = train(model, optimizer, body)
    assert first_of(alarms) == ("no-gradient", None, step)
    assert alarms[0].evidence.startswith("No gradient reaches the optimizer")


# gradients-not-cleared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False], ids=["optimizer given", "optimizer unknown"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_forgotten_zero_grad_is_named(micro_batches: int, given: bool) -> None:
    model = decoder()
    optimizer = adamw(model, 1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        for micro in range(micro_batches):
            loss = token_loss(model, some_tokens(100 * step + micro))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    assert first_of(train(model, optimizer if given else None, body)) == ("gradients-not-cleared", None, 3)


def test_zero_grad_that_is_lost_during_the_run_is_named() -> None:
    model = decoder()
    optimizer = adamw(model, 1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        if step < 13:
            optimizer.zero_grad()
        loss = token_loss(model, some_tokens(step))
        loss.backward()
        optimizer.step()
        return loss.detach()

    assert first_of(train(model, optimizer, body)) == ("gradients-not-cleared", None, 14)


# learning-rate-zero ---------------------------------------------------------------------------------------------------


def with_rates(optimizer: torch.optim.Optimizer, rate: Callable[[int], float]) -> Callable[[int], None]:
    def before(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)

    return before


def test_learning_rate_that_drops_to_zero_warns_and_fails() -> None:
    model = decoder()
    optimizer = adamw(model)
    body = ordinary(model, optimizer, with_rates(optimizer, lambda step: 1e-2 if step < 11 else 0.0))
    alarms = train(model, optimizer, body)
    assert [(alarm.severity, alarm.step) for alarm in alarms] == [("warn", 12), ("fail", 20)]
    assert alarms[0].evidence.startswith("Learning rate 0 since step 11, after 0.01: 2 steps")


def test_learning_rate_zero_from_the_start_warns_and_fails() -> None:
    model = decoder()
    optimizer = adamw(model, 0.0)
    alarms = train(model, optimizer, ordinary(model, optimizer))
    assert [(alarm.rule, alarm.severity, alarm.step) for alarm in alarms] == [
        ("learning-rate-zero", "warn", 3), ("learning-rate-zero", "fail", 20),
    ]  # fmt: skip


def test_training_after_the_end_of_a_schedule_warns() -> None:
    model = decoder()
    optimizer = adamw(model)
    body = ordinary(model, optimizer, with_rates(optimizer, lambda step: 1e-3 * max(0.0, 1 - step / 8)))
    assert first_of(train(model, optimizer, body), "warn") == ("learning-rate-zero", None, 27)


# updates-lost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_updates_of_bfloat16_weights_that_are_lost_are_named(kind: type[torch.optim.Optimizer]) -> None:
    model = decoder().bfloat16()
    optimizer = kind(model.parameters(), lr=1e-6 if kind is torch.optim.AdamW else 1e-4)
    alarms = train(model, optimizer, ordinary(model, optimizer))
    assert first_of(alarms) == ("updates-lost", None, 20)
    assert "bfloat16 weights" in alarms[0].evidence


def test_gains_that_never_leave_one_are_a_warning() -> None:
    model = decoder().bfloat16()
    optimizer = adamw(model, 1e-3, weight_decay=0.0)
    alarms = train(model, optimizer, ordinary(model, optimizer))
    assert first_of(alarms, "warn")[0] == "updates-lost"
    assert "gains" in alarms[0].evidence


# steps-skipped --------------------------------------------------------------------------------------------------------


class Scaler(torch.amp.GradScaler):
    """A GradScaler that works on the CPU."""

    def __init__(self, scale: float = 2.0**16) -> None:
        super().__init__("cpu", init_scale=scale)


def scaled(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler, factor: Callable[[int, float], float]
) -> Callable[[int, Watch], Tensor]:
    """Return the body of a loop with a scaler; `factor(step, scale)` makes gradients overflow where it is infinite."""
    state = {"factor": 1.0}
    model.blocks[1].register_full_backward_pre_hook(lambda module, grads: tuple(g * state["factor"] for g in grads))

    def body(step: int, watched: Watch) -> Tensor:
        state["factor"] = factor(step, scaler.get_scale())
        loss = token_loss(model, some_tokens(step))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return body


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_that_skips_every_step_is_named(fused: bool) -> None:
    model, scaler = decoder(), Scaler(2.0**40)
    optimizer = adamw(model, 1e-3, fused=fused)
    alarms = train(model, optimizer, scaled(model, optimizer, scaler, lambda *_: float("inf")), scaler=scaler)
    assert [(alarm.rule, alarm.severity, alarm.step) for alarm in alarms] == [
        ("steps-skipped", "warn", 15), ("steps-skipped", "fail", 20),
    ]  # fmt: skip
    assert alarms[0].layer.startswith("blocks.1.")
    assert "skipped the last 15 steps at a scale of 33,600,000" in alarms[0].evidence


def test_scaler_that_skips_some_steps_during_the_run_warns() -> None:
    model, scaler = decoder(), Scaler()
    optimizer = adamw(model, 1e-3)
    overflow: Callable[[int, float], float] = lambda step, scale: float("inf") if 12 <= step <= 15 else 1.0  # noqa: E731
    alarms = train(model, optimizer, scaled(model, optimizer, scaler, overflow), scaler=scaler)
    assert [(alarm.rule, alarm.severity, alarm.step) for alarm in alarms] == [("steps-skipped", "warn", 15)]


def test_forgotten_optimizer_step_is_named() -> None:
    model = decoder()
    optimizer = adamw(model)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(step))
        loss.backward()
        optimizer.zero_grad()
        return loss.detach()

    alarms = train(model, optimizer, body, steps=100)
    assert [(alarm.severity, alarm.step) for alarm in alarms if alarm.rule == "steps-skipped"] == [
        ("warn", 20), ("fail", 100),
    ]  # fmt: skip


# stale-parameters -----------------------------------------------------------------------------------------------------


def test_optimizer_replaced_during_the_run_is_named() -> None:
    model = decoder()
    optimizers = [adamw(model, 1e-3), adamw(model, 1e-4)]
    bodies = [ordinary(model, optimizer) for optimizer in optimizers]
    alarms = train(model, optimizers[0], lambda step, watched: bodies[step > 10](step, watched))
    assert first_of(alarms, "warn") == ("stale-parameters", None, 15)
    assert "none of the optimizers" in alarms[0].evidence


def test_replaced_module_is_named_with_whether_it_is_trained() -> None:
    model = decoder()
    optimizer = adamw(model, 1e-3)

    def replace(step: int) -> None:
        if step == 12:
            model.blocks[2].feed_forward = copy.deepcopy(model.blocks[2].feed_forward)

    alarms = train(model, optimizer, ordinary(model, optimizer, replace))
    assert first_of(alarms) == ("stale-parameters", "blocks.2.feed_forward", 15)
    assert "4 parameters of blocks.2.feed_forward" in alarms[0].evidence

    def replace_and_add(step: int) -> None:
        replace(step)
        if step == 12:
            optimizer.add_param_group({"params": list(model.blocks[2].feed_forward.parameters())})

    model = decoder()
    optimizer = adamw(model, 1e-3)
    alarms = train(model, optimizer, ordinary(model, optimizer, replace_and_add))
    assert first_of(alarms, "warn") == ("stale-parameters", "blocks.2.feed_forward", 15)
    assert "4 replaced" in alarms[0].evidence


def test_optimizer_of_replaced_modules_is_named() -> None:
    model = decoder()
    optimizer = adamw(model, 1e-3)
    model.blocks[2] = copy.deepcopy(model.blocks[2])
    alarms = train(model, optimizer, ordinary(model, optimizer))
    (alarm,) = [alarm for alarm in alarms if alarm.rule == "stale-parameters"]
    assert (alarm.severity, alarm.step) == ("fail", 1)
    assert "holds 16 tensors" in alarm.evidence


def replace_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())


def alarms_of_two_models(
    begins: int, rebuild: Callable[[nn.Module], nn.Module | None], new_optimizer: bool = False
) -> list[Alarm]:
    """Return the alarms of a run that trains what `rebuild` returns from step `begins` on."""
    model: nn.Module = decoder()
    watched_model, optimizer = model, adamw(model, 1e-2)
    with watch(model, optimizer, every=5) as watched:
        for step in range(1, STEPS + 1):
            if step == begins:
                model = rebuild(watched_model) or watched_model
                optimizer = adamw(model, 1e-2) if new_optimizer else optimizer
            loss = token_loss(model, some_tokens(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss.detach())
    return watched.alarms


REBUILDS: dict[str, tuple[Callable[[nn.Module], nn.Module | None], str]] = {
    "copied": (copy.deepcopy, "was not called in the last 3 steps, but the optimizer"),
    "built again": (lambda model: decoder(), "was not called in the last 3 steps, but the optimizer"),
    "parameters replaced": (replace_parameters, "The optimizer does not hold the new ones"),
}


@pytest.mark.parametrize("begins", [1, 11])
@pytest.mark.parametrize("name", REBUILDS)
def test_alarms_after_the_model_was_replaced_lead_to_the_optimizer(name: str, begins: int) -> None:
    rebuild, words = REBUILDS[name]
    alarms = alarms_of_two_models(begins, rebuild)
    cause = leading(alarms)
    assert cause is not None
    assert (cause.rule, cause.severity) == ("stale-parameters", "fail")
    assert begins <= cause.step <= begins + 2
    assert words in cause.evidence
    assert [alarm.rule for alarm in alarms if alarm.rule == "no-gradient"] == ["no-gradient"]
    assert all(root is cause for root in roots(alarms))


def test_run_of_another_model_and_optimizer_is_no_longer_measured() -> None:
    (alarm,) = alarms_of_two_models(11, copy.deepcopy, new_optimizer=True)
    assert (alarm.rule, alarm.severity, alarm.step) == ("stale-parameters", "warn", 13)


def test_optimizer_of_a_copy_is_named_without_advice_about_zero_grad() -> None:
    model = decoder()
    optimizer = adamw(copy.deepcopy(model), 1e-2)
    with watch(model, optimizer, every=5) as watched:
        for step in range(1, STEPS + 1):
            watched.step(ordinary(model, optimizer)(step, watched))
    coverage, cause = watched.alarms[:2]
    assert (coverage.rule, coverage.layer, coverage.step) == ("optimizer-coverage", None, 0)
    assert (cause.rule, cause.severity, cause.step) == ("stale-parameters", "fail", 1)
    assert leading(watched.alarms) is cause
    assert all(root is cause for root in roots(watched.alarms))
    assert "zero_grad" not in " ".join(alarm.text for alarm in watched.alarms)


def test_forward_without_gradients_is_a_call_of_the_model() -> None:
    model = decoder()
    optimizer = adamw(model, 1e-2)

    def body(step: int, watched: Watch) -> Tensor:
        with torch.no_grad():
            loss = token_loss(model, some_tokens(step))
        optimizer.step()
        return loss

    assert {alarm.rule for alarm in train(model, optimizer, body)} == {"no-gradient"}


# gradient-clipped and identical-batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_gradient_clipped_to_almost_nothing_warns(kind: type[torch.optim.Optimizer]) -> None:
    model = decoder()
    optimizer = kind(model.parameters(), lr=1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    alarms = train(model, optimizer, body)
    assert first_of(alarms, "warn") == ("gradient-clipped", None, 25)
    assert ("Adam undoes" in alarms[0].remedy) is (kind is torch.optim.AdamW)


@pytest.mark.parametrize("every", [5, 1])
def test_same_batch_in_every_step_warns(every: int) -> None:
    model = decoder()
    optimizer = adamw(model, 1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    assert first_of(train(model, optimizer, body, every=every), "warn") == (
        "identical-batches",
        None,
        {5: 6, 1: 5}[every],
    )


def test_batches_that_come_four_times_warn() -> None:
    model = decoder()
    optimizer = adamw(model, 1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens((step - 1) // 4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    alarms = train(model, optimizer, body, steps=60)
    assert first_of(alarms, "warn")[0] == "identical-batches"
    assert alarms[0].evidence.startswith("Batches come several times")


# Healthy loops --------------------------------------------------------------------------------------------------------


def accumulates(model: Decoder) -> list[Alarm]:
    optimizer = adamw(model, 1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        for micro in range(3):
            loss = token_loss(model, some_tokens(100 * step + micro)) / 3
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        return loss.detach()

    return train(model, optimizer, body)


def clears_through_data(model: Decoder) -> list[Alarm]:
    optimizer = adamw(model, 1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.data.zero_()  # does not change the version
        loss = token_loss(model, some_tokens(step))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train(model, optimizer, body)


def steps_before_it_clears(model: Decoder) -> list[Alarm]:
    """Gradients stay until just before the next backward pass; the loss is recomputed inside a closure."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)

    def body(step: int, watched: Watch) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = token_loss(model, some_tokens(step))
            loss.backward()
            return loss

        return optimizer.step(closure).detach()  # type: ignore[arg-type,union-attr]

    return train(model, optimizer, body)


class LowRank(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, linear.in_features) / 4)
        self.b = nn.Parameter(torch.zeros(linear.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.a.T @ self.b.T


def trains_adapters(model: Decoder) -> list[Alarm]:
    model.requires_grad_(False)
    for block in model.blocks:
        block.attention.q = LowRank(block.attention.q)
        block.feed_forward.up = LowRank(block.feed_forward.up)
    optimizer = adamw(model, 1e-2)
    return train(model, optimizer, ordinary(model, optimizer), every=1)


def begins_with_zero_branches(model: Decoder) -> list[Alarm]:
    for block in model.blocks:
        nn.init.zeros_(block.attention.out.weight)
        nn.init.zeros_(block.feed_forward.down.weight)
    optimizer = adamw(model, 1e-3)
    return train(model, optimizer, ordinary(model, optimizer), every=1)


def freezes_the_backbone(model: Decoder) -> list[Alarm]:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer = adamw(model, 1e-3)
    return train(model, optimizer, ordinary(model, optimizer))


def has_an_unused_head(model: Decoder) -> list[Alarm]:
    model.pooler = nn.Linear(WIDTH, WIDTH)
    model.blocks[1].unused = nn.Linear(WIDTH, WIDTH)

    def pool(module: nn.Module, args: tuple[Tensor]) -> None:
        model.pooler(args[0])

    model.head.register_forward_pre_hook(pool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return train(model, optimizer, ordinary(model, optimizer))


class TwoDecoders(nn.Module):
    def __init__(self, first: Decoder) -> None:
        super().__init__()
        self.first, self.second = first, copy.deepcopy(first)


def trains_two_parts_alternately(model: Decoder) -> list[Alarm]:
    both = TwoDecoders(model)
    optimizers = [adamw(both.first, 1e-3), adamw(both.second, 1e-3)]

    def body(step: int, watched: Watch) -> Tensor:
        turn = step % 3 == 0
        logits = both.first(some_tokens(step)[:, :-1])
        if turn:
            logits = logits.detach()
        other = both.second(some_tokens(step)[:, :-1])
        loss = F.mse_loss(logits, other.detach() if not turn else other)
        optimizers[turn].zero_grad()
        loss.backward()
        optimizers[turn].step()
        return loss.detach()

    return train(both, list(optimizers), body)


def trains_adversarially(model: Decoder) -> list[Alarm]:
    """The second part's gradients are left over from the first part's turn, and cleared before they are used."""
    both = TwoDecoders(model)
    optimizers = [adamw(both.first, 1e-3), adamw(both.second, 1e-3)]

    def body(step: int, watched: Watch) -> Tensor:
        x = some_tokens(step)[:, :-1]
        for turn in (0, 1):
            optimizers[turn].zero_grad(set_to_none=step % 2 == 0)
            loss = F.mse_loss(both.first(x), both.second(x))
            loss.backward()
            optimizers[turn].step()
        return loss.detach()

    return train(both, list(optimizers), body)


def warms_up_from_zero(model: Decoder) -> list[Alarm]:
    optimizer = adamw(model, 1e-3)
    return train(
        model,
        optimizer,
        ordinary(model, optimizer, with_rates(optimizer, lambda step: 1e-3 * min(1.0, (step - 1) / 10))),
    )


def ends_at_zero(model: Decoder) -> list[Alarm]:
    optimizer = adamw(model, 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 3)
    body = ordinary(model, optimizer)

    def scheduled(step: int, watched: Watch) -> Tensor:
        loss = body(step, watched)
        if step < STEPS - 2:
            schedule.step()
        return loss

    return train(model, optimizer, scheduled)


def freezes_a_group_by_its_learning_rate(model: Decoder) -> list[Alarm]:
    groups = [{"params": list(model.blocks.parameters()), "lr": 0.0}, {"params": list(model.head.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    model.embedding.requires_grad_(False)
    model.final_norm.requires_grad_(False)
    return train(model, optimizer, ordinary(model, optimizer))


def searches_its_scale(model: Decoder) -> list[Alarm]:
    scaler, optimizer = Scaler(), adamw(model, 1e-3)
    overflow: Callable[[int, float], float] = lambda step, scale: float("inf") if scale > 2.0**6 else 1.0  # noqa: E731
    return train(model, optimizer, scaled(model, optimizer, scaler, overflow), scaler=scaler)


class Experts(nn.Module):
    """Every token goes to one of four experts; with few tokens some are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        best, y = weights[..., :3].argmax(-1), torch.zeros_like(x)  # the last one is never used
        for at, expert in enumerate(self.experts):
            if (best == at).any():
                y = y + torch.where((best == at)[..., None], weights[..., at : at + 1] * expert(x), 0)
        return y


def has_unused_experts(model: Decoder) -> list[Alarm]:
    for block in model.blocks:
        block.feed_forward = Experts()
    optimizer = adamw(model, 1e-3)
    return train(model, optimizer, ordinary(model, optimizer))


def drops_blocks(model: Decoder) -> list[Alarm]:
    model.around = lambda block, x, mask: x if torch.rand(()) < 0.4 else block(x, mask)
    optimizer = adamw(model, 1e-3)
    return train(model, optimizer, ordinary(model, optimizer), every=1)


def skips_branches_at_random(model: Decoder) -> list[Alarm]:
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, mask=None, forward=forward: x if torch.rand(()) < 0.4 else forward(x, mask)
    optimizer = adamw(model, 1e-3)
    return train(model, optimizer, ordinary(model, optimizer), steps=60)


def keeps_bfloat16_weights_moving(model: Decoder) -> list[Alarm]:
    model.bfloat16()
    optimizer = torch.optim.SGD([*model.blocks.parameters(), *model.embedding.parameters()], lr=1.0)
    model.head.requires_grad_(False)
    model.final_norm.requires_grad_(False)
    return train(model, optimizer, ordinary(model, optimizer))


class WithMasters(torch.optim.SGD):
    """Keeps a float32 copy of each weight in its state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("master", parameter.float())
                state["master"] -= group["lr"] * parameter.grad.float()
                parameter.copy_(state["master"])


def keeps_master_weights(model: Decoder) -> list[Alarm]:
    model.bfloat16()
    optimizer = WithMasters(model.parameters(), lr=1e-4)
    return train(model, optimizer, ordinary(model, optimizer))


def divides_by_the_number_of_tokens(model: Decoder) -> list[Alarm]:
    optimizer = adamw(model, 1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(step)) * 1000
        loss.backward()
        for parameter in model.parameters():
            parameter.grad /= 1000  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach() / 1000

    return train(model, optimizer, body)


def repeats_its_data(model: Decoder) -> list[Alarm]:
    """There are as many batches as steps between samples, in the same order."""
    optimizer = adamw(model, 1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        with torch.no_grad():
            model(some_tokens(0)[:, :-1])  # an evaluation on a fixed batch
        loss = token_loss(model, some_tokens(step % EVERY))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train(model, optimizer, body, steps=40)


def is_stepped_for_each_micro_batch(model: Decoder) -> list[Alarm]:
    optimizer = adamw(model, 1e-3)

    def body(step: int, watched: Watch) -> Tensor:
        loss = token_loss(model, some_tokens(step))
        loss.backward()
        if step % 8 == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return train(model, optimizer, body, steps=40)


def unfreezes_later(model: Decoder) -> list[Alarm]:
    model.blocks.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return train(
        model, optimizer, ordinary(model, optimizer, lambda step: model.blocks.requires_grad_(step > 10) and None)
    )


HEALTHY = (
    accumulates, clears_through_data, steps_before_it_clears, trains_adapters, begins_with_zero_branches,
    freezes_the_backbone, has_an_unused_head, trains_two_parts_alternately, trains_adversarially, warms_up_from_zero,
    ends_at_zero, freezes_a_group_by_its_learning_rate, searches_its_scale, has_unused_experts, drops_blocks,
    skips_branches_at_random, keeps_bfloat16_weights_moving, keeps_master_weights, divides_by_the_number_of_tokens, repeats_its_data,
    is_stepped_for_each_micro_batch, unfreezes_later,
)  # fmt: skip


@pytest.mark.parametrize("loop", HEALTHY, ids=lambda loop: loop.__name__)
def test_healthy_loop_raises_no_alarm(loop: Callable[[Decoder], list[Alarm]]) -> None:
    assert loop(decoder()) == []
