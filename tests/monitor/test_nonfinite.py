"""The first NaN or infinity: its step, phase and place, also between samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.watched_models import Decoder, adamw, some_tokens, token_loss, tokens_of, train_watched
from torch import Tensor, nn

from omninorm.monitor import NonFinite, Watch, watch

BAD = 7  # between the samples of steps 1 and 10


class Spoils(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * math.nan


def trained(model: nn.Module, spoil: Any, every: int = 10, steps: int = 12, optimizer: Any = None) -> Watch:
    """Trains; `spoil(now)` is called before every step with whether it is the bad one."""
    optimizer = optimizer or adamw(model)
    with watch(model, optimizer, every=every, rules=[]) as watched:
        for step in range(1, steps + 1):
            spoil(step == BAD)
            loss = tokens_of(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    (event,) = [event for event in watched.record if event["kind"] == "nonfinite"]
    found = watched.history.nonfinite
    assert found is not None
    assert event == {
        "kind": "nonfinite",
        "step": found.step,
        "phase": found.phase,
        "layer": found.layer,
        "value": found.value,
        "after": found.after,
    }
    return watched


@pytest.mark.parametrize("every", [1, 3, 10, 100])
def test_nan_in_a_batch_is_located_at_the_embedding(every: int) -> None:
    model, noise = Decoder(), torch.zeros(())
    model.embedding.register_forward_hook(lambda module, args, y: y + noise)
    watched = trained(model, lambda now: noise.fill_(math.nan if now else 0.0), every)
    assert watched.history.nonfinite == NonFinite(BAD, "forward", "embedding", "nan")


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(("part", "after"), [("attention", "blocks.0"), ("feed_forward", "blocks.1.attention")])
def test_fp16_overflow_is_located(every: int, part: str, after: str) -> None:
    """One layer's weights are too large for its dtype."""
    model = Decoder(blocks=3)
    layer = model.blocks[1].attention.out if part == "attention" else model.blocks[1].feed_forward.down
    factor = torch.ones(())
    layer.register_forward_hook(lambda module, args, y: (y * factor).half().float())
    watched = trained(model, lambda now: factor.fill_(1e7) if now else None, every)
    assert watched.history.nonfinite == NonFinite(BAD, "forward", f"blocks.1.{part}", "inf", after)


def test_infinity_inside_a_block_is_located() -> None:
    """Between its parts: the block itself is named."""
    model, factor = Decoder(), torch.ones(())
    model.blocks[1].register_forward_hook(lambda module, args, y: y / factor)
    watched = trained(model, lambda now: factor.fill_(0.0 if now else 1.0))
    assert watched.history.nonfinite == NonFinite(BAD, "forward", "blocks.1", "inf", "blocks.1.feed_forward")


def test_nan_between_the_embedding_and_the_first_block_names_both() -> None:
    """No module computes it: the code between them does, as where embeddings are scaled or dropped."""
    model, noise = Decoder(), torch.zeros(())
    model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] + noise, *args[1:]))
    watched = trained(model, lambda now: noise.fill_(math.nan if now else 0.0))
    assert watched.history.nonfinite == NonFinite(BAD, "forward", "blocks.0.attention", "nan", "embedding")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_infinity_in_the_loss_alone_is_located(value: float) -> None:
    model = Decoder()
    with watch(model, every=10, rules=[]) as watched:
        for step in range(1, 10):
            watched.step(value if step == BAD else 1.0)
    assert watched.history.nonfinite == NonFinite(BAD, "loss", None, "nan" if math.isnan(value) else "inf")


@pytest.mark.parametrize("every", [1, 10])
def test_nan_in_a_gradient_is_located(every: int) -> None:
    """The forward pass and the loss are fine; backward meets block 1's feed-forward first."""
    model, bad = Decoder(blocks=3), [False]
    model.blocks[1].feed_forward.up.register_forward_hook(lambda module, args, y: Spoils.apply(y) if bad[0] else None)
    watched = trained(model, lambda now: bad.__setitem__(0, now), every)
    found = watched.history.nonfinite
    assert (found.step, found.phase, found.value) == (BAD, "backward", "nan")
    assert found.layer in ("blocks.1.feed_forward.up.weight", "blocks.1.feed_forward.up.bias")
    assert math.isfinite(watched.history.steps[BAD - 1].loss)
    assert math.isnan(watched.history.steps[BAD - 1].grad_norm)


def test_nan_gradient_through_a_frozen_layer_is_located() -> None:
    """The parameters next to it do not learn: those before it tell."""
    model, bad = Decoder(blocks=3), [False]
    model.blocks[1].requires_grad_(False)
    model.blocks[1].register_forward_hook(lambda module, args, y: Spoils.apply(y) if bad[0] else None)
    watched = trained(model, lambda now: bad.__setitem__(0, now))
    found = watched.history.nonfinite
    assert (found.step, found.phase) == (BAD, "backward")
    assert found.layer.startswith("blocks.0.feed_forward.down")


@pytest.mark.parametrize("every", [1, 10])
def test_nan_from_the_optimizer_is_located(every: int) -> None:
    """A rate of NaN: the gradients are fine, the weights are not."""
    model = Decoder()
    parts = [model.embedding, model.blocks, model.final_norm]
    optimizer = torch.optim.SGD(
        [{"params": [p for part in parts for p in part.parameters()]}, {"params": model.head.parameters()}], lr=0.1
    )
    rate = lambda now: optimizer.param_groups[1].update(lr=math.nan if now else 0.1)  # noqa: E731
    watched = trained(model, rate, every, optimizer=optimizer)
    assert watched.history.nonfinite == NonFinite(BAD, "optimizer", "head.weight", "nan")


def test_model_full_of_nan_is_reported_at_the_first_step() -> None:
    model = Decoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    watched = train_watched(model, adamw(model), 12, every=5)
    assert watched.history.nonfinite == NonFinite(1, "forward", "embedding", "nan")
    assert [sample.step for sample in watched.history.samples] == [1, 5, 10]
    assert all(math.isnan(step.loss) for step in watched.history.steps)
    assert sum(event["kind"] == "nonfinite" for event in watched.record) == 1


def test_nan_in_a_model_without_blocks_is_located() -> None:
    """Embedding, a recurrent layer, a head: every part that has weights is looked at."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.rnn, self.head = nn.Embedding(23, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 23)
            self.factor = 1.0

        def forward(self, tokens: Tensor) -> Tensor:
            y, _ = self.rnn(self.embedding(tokens))
            logits: Tensor = self.head(y * self.factor)
            return logits

    model = Recurrent()
    model.rnn.register_forward_hook(lambda module, args, y: (y[0] * model.factor, y[1]))
    watched = trained(model, lambda now: setattr(model, "factor", math.inf if now else 1.0))
    assert watched.history.nonfinite == NonFinite(BAD, "forward", "rnn", "inf", "embedding")


def test_overflow_in_an_evaluation_is_ignored() -> None:
    """What is not trained on is nobody's NaN."""
    model = Decoder()
    with watch(model, adamw(model), every=2, rules=[]) as watched:
        for step in range(1, 5):
            loss = tokens_of(model, step)
            loss.backward()
            with torch.no_grad():
                model.blocks[0](torch.full((1, 2, 16), math.inf))
            watched.step(loss)
    assert watched.history.nonfinite is None


def test_nan_in_a_micro_batch_is_located() -> None:
    """Only the first of two is bad."""
    model, noise = Decoder(), torch.zeros(())
    model.embedding.register_forward_hook(lambda module, args, y: y + noise)
    with watch(model, every=10, rules=[]) as watched:
        for step in range(1, 10):
            for part in (0, 1):
                noise.fill_(math.nan if (step, part) == (BAD, 0) else 0.0)
                token_loss(model, some_tokens(2 * step + part)).backward()
            model.zero_grad()
            watched.step(1.0)
    assert watched.history.nonfinite == NonFinite(BAD, "forward", "embedding", "nan")


def test_large_finite_numbers_raise_no_alarm() -> None:
    """Activations whose squares overflow float32."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with watch(model, every=1, rules=[]) as watched:
        loss = model(torch.full((2, 4), 1e25)).mean() * 1e-15
        loss.backward()
        watched.step(loss)
    assert watched.history.nonfinite is None
    assert watched.history.steps[0].grad_norm > 1e9
