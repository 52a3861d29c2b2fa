"""Numerical faults: NaNs and infinities, by origin, saturated attention, and reduced precision."""

from __future__ import annotations

import dataclasses
import math

import torch
from faults.faults import block_of, change_input, change_output, fault, last_linear, multiply, once, part_of
from faults.tasks import Batch
from faults.training import Training
from torch import Tensor

FAMILY = "numerics"
LOGITS = {"attention-logits", "attention-entropy", "odd-block", "layer-jump"}


@fault("NaN in a weight", FAMILY, {"nonfinite"}, early=False, at_once=True, layered=True)
def nan_weight(training: Training) -> None:
    """A weight of one block becomes NaN."""
    block, name = block_of(training)
    training.layers = (name,)

    @torch.no_grad()
    def spoil() -> None:
        next(p for p in block.parameters() if p.ndim > 1).view(-1)[0] = math.nan

    once(training, spoil)


@fault("NaN in one batch", FAMILY, {"nonfinite"}, early=False, at_once=True, layered=True)
def nan_batch(training: Training) -> None:
    """The embeddings of one batch contain a NaN."""
    name = training.architecture.layout.embedding
    training.layers = (name,)
    change_output(training.model.get_submodule(name), lambda y: y + math.nan if training.step == training.begins else y)


@fault("fp16 overflow", FAMILY, {"nonfinite", "headroom"}, early=False, at_once=True, layered=True)
def overflow(training: Training) -> None:
    """The last sublayer of one block overflows fp16."""
    layout = training.architecture.layout
    part = "feed_forward" if layout.feed_forward else "norm"
    module, name = part_of(training, part)
    training.layers = (name,)
    change_output(module, lambda y: (y * 1e7).half().to(y.dtype) * 1e-7 if training.faulty else y)


@fault("NaN in a gradient", FAMILY, {"nonfinite"}, early=False, at_once=True, layered=True)
def nan_gradient(training: Training) -> None:
    """One block's backward pass divides 0 by 0, like a norm of 0."""
    block, name = block_of(training)
    index = int(name.rsplit(".", 1)[1])
    training.layers = tuple(f"{name.rsplit('.', 1)[0]}.{each}" for each in range(index + 1))
    change_output(block, lambda y: y + 0.0 * (y * 0.0).square().sum().sqrt() if training.faulty else y)


@fault("log of 0 in the loss", FAMILY, {"nonfinite"}, early=False, at_once=True, frozen=True)
def log_of_zero(training: Training) -> None:
    """The loss takes the logarithm of probabilities that underflow."""
    criterion = training.criterion

    def logarithm(logits: Tensor, labels: Tensor) -> Tensor:
        loss = criterion(logits, labels)
        return -torch.log(torch.exp(-200.0 * loss)) / 200.0 if training.faulty else loss

    training.criterion = logarithm


@fault(
    "fully masked attention row", FAMILY, {"nonfinite"}, early=False, at_once=True, layered=True, needs=("attention",)
)
def masked_row(training: Training) -> None:
    """A row of one block's attention is masked completely, so its softmax is 0/0."""
    attention, name = part_of(training, "attention")
    training.layers = (name,)

    def spoil(x: Tensor) -> Tensor:
        rows = torch.zeros(x.shape[0], *[1] * (x.ndim - 1))
        rows[0] = math.nan
        return x + rows if training.faulty else x

    change_input(last_linear(attention), spoil)


@fault("queries × 30 in one block", FAMILY, LOGITS, layered=True, needs=("query",))
def saturated_queries(training: Training) -> None:
    """One block's query projection is 30 times too large, so its softmax saturates."""
    query, _ = part_of(training, "query")
    training.layers = (part_of(training, "attention")[1],)
    multiply(query, 30.0)


@fault("queries × 30 later", FAMILY, LOGITS, early=False, layered=True, needs=("query",))
def saturated_queries_later(training: Training) -> None:
    """In the middle of the run one block's query projection is multiplied by 30."""
    query, _ = part_of(training, "query")
    training.layers = (part_of(training, "attention")[1],)
    once(training, lambda: multiply(query, 30.0))


@fault("queries grow", FAMILY, LOGITS, early=False, layered=True, needs=("query",))
def queries_grow(training: Training) -> None:
    """From some step on one block's query projection grows by 15 % per step."""
    query, _ = part_of(training, "query")
    training.layers = (part_of(training, "attention")[1],)
    training.before.append(lambda: multiply(query, 1.15) if training.faulty else None)


@fault("softmax before the loss", FAMILY, {"double-softmax"}, frozen=True)
def double_softmax(training: Training) -> None:
    """Probabilities are passed to cross_entropy, which expects logits."""
    criterion = training.criterion
    training.criterion = lambda logits, labels: criterion(logits.softmax(-1), labels)


# Precision ------------------------------------------------------------------------------------------------------------


@fault("bf16 weights without float32 copies", "precision", {"updates-lost"}, variant="tiny learning rate")
def bf16_weights(training: Training) -> None:
    """Weights are bfloat16, and updates are so small that rounding drops them."""
    training.model.to(torch.bfloat16)
    data = training.data

    def rounded(step: int) -> Batch:
        batch = data(step)
        return batch if batch.images is None else dataclasses.replace(batch, images=batch.images.to(torch.bfloat16))

    training.data = rounded


@fault("loss scaled down", "precision", {"adam-eps"}, frozen=True)
def loss_scaled_down(training: Training) -> None:
    """The loss is divided by 1e9 and not unscaled, so gradients are below Adam's ε."""
    training.set(clip=float("inf"))
    divided = training.divided
    training.divided = lambda loss: divided(loss) * 1e-9  # type: ignore[method-assign]


@fault("gradients flushed to 0", "precision", {"no-gradient", "adam-eps", "gradient-underflow"})
def gradients_flushed(training: Training) -> None:
    """Small gradients underflow, as in fp16 without loss scaling."""

    def flush() -> None:
        for parameter in training.model.parameters():
            if parameter.grad is not None:
                parameter.grad = (parameter.grad * 1e-5).half().float() * 1e5

    training.after_backward.append(flush)


@fault("scaler skips every step", "precision", {"steps-skipped", "nonfinite"}, early=False)
def scaler_skips(training: Training) -> None:
    """The GradScaler finds an infinite gradient in every step and skips it."""
    training.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    block, _ = block_of(training)
    weight = next(p for p in block.parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient * math.inf if training.faulty else gradient)


@fault("autocast lost", "precision", {"autocast-lost"}, variant="bf16 autocast", at_once=True)
def autocast_lost(training: Training) -> None:
    """Autocast is not active where the user believes it is (a case of TrainCheck)."""
    training.set(autocast=False)
