"""Faults of gradient flow: gradients that do not arrive, vanish or explode."""

from __future__ import annotations

import torch
from faults.faults import block_of, change_branch, change_input, change_output, fault, part_of, scale_gradient
from faults.training import Training
from torch import Tensor

FAMILY = "gradient flow"


@fault("no backward", FAMILY, {"no-gradient", "steps-skipped"}, early=False, at_once=True, frozen=True)
def no_backward(training: Training) -> None:
    """From some step on, `loss.backward()` is not called."""
    backward = training.backward
    training.backward = lambda loss: None if training.faulty else backward(loss)


@fault("first half detached", FAMILY, {"no-gradient"}, at_once=True, layered=True)
def first_half_detached(training: Training) -> None:
    """The stream is detached before the middle block, so the blocks before it get no gradient."""
    block, name = block_of(training)
    change_input(block, Tensor.detach)
    middle = int(name.rsplit(".", 1)[1])
    blocks = training.architecture.layout.blocks
    training.layers = (*(f"{blocks}.{index}" for index in range(middle)), *_before(training))


def _before(training: Training) -> tuple[str, ...]:
    """Return the parts before the blocks, which get no gradient from them either."""
    embedding = training.architecture.layout.embedding
    parent = embedding.rsplit(".", 1)[0] if "embed" in embedding.rsplit(".", 1)[0] else embedding
    return parent, "wpe", "position", "transformer.wpe", "encoder"


@fault("attention detached", FAMILY, {"no-gradient"}, at_once=True, layered=True, needs=("attention",))
def attention_detached(training: Training) -> None:
    """The output of one block's attention is detached from the graph."""
    attention, name = part_of(training, "attention")
    change_output(attention, Tensor.detach)
    training.layers = (name,)


@fault("feed-forward detached", FAMILY, {"no-gradient"}, at_once=True, layered=True, needs=("feed_forward",))
def feed_forward_detached(training: Training) -> None:
    """The output of one block's feed-forward is computed under `torch.no_grad()`."""
    feed_forward, name = part_of(training, "feed_forward")
    change_output(feed_forward, Tensor.detach)
    training.layers = (name,)


@fault("detached from the middle on", FAMILY, {"no-gradient"}, early=False, at_once=True, layered=True)
def detached_later(training: Training) -> None:
    """From some step on, the branches of one block are detached."""
    block, name = block_of(training)
    change_branch(block, lambda x, y: x + (y - x).detach() if training.faulty else y)
    training.layers = (name,)


@fault("everything important frozen", FAMILY, {"no-gradient", "optimizer-coverage", "frozen-weights"}, at_once=True)
def everything_frozen(training: Training) -> None:
    """All parameters but the norms' gains have requires_grad=False (a case of TrainCheck)."""
    for parameter in training.model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)


@fault(
    "gradient vanishes in a block",
    FAMILY,
    {"gradient-jump", "depth-growth", "adam-eps", "odd-block", "no-gradient"},
    layered=True,
)
def gradient_vanishes(training: Training) -> None:
    """The gradient is multiplied by 1e-8 on its way through one block."""
    block, name = block_of(training)
    change_output(block, lambda y: scale_gradient(y, 1e-8))
    index = int(name.rsplit(".", 1)[1])
    blocks = training.architecture.layout.blocks
    training.layers = (*(f"{blocks}.{each}" for each in range(index + 1)), *_before(training))


@fault("gradient explodes in a block", FAMILY, {"gradient-jump", "depth-growth", "odd-block"}, layered=True)
def gradient_explodes(training: Training) -> None:
    """The gradient is multiplied by 1,000 on its way through one block."""
    block, name = block_of(training)
    change_output(block, lambda y: scale_gradient(y, 1e3))
    index = int(name.rsplit(".", 1)[1])
    blocks = training.architecture.layout.blocks
    training.layers = (*(f"{blocks}.{each}" for each in range(index + 1)), *_before(training))


@fault("gradient replaced by noise", FAMILY, {"gradient-noise"}, early=False)
def gradient_noise(training: Training) -> None:
    """From some step on, gradients are random: a buffer that is reused before the reduction has finished."""
    generator = torch.Generator().manual_seed(training.seed)

    def spoil() -> None:
        for parameter in training.model.parameters():
            if training.faulty and parameter.grad is not None:
                size = parameter.grad.pow(2).mean().sqrt()
                parameter.grad = size * torch.randn(parameter.shape, generator=generator)

    training.after_backward.append(spoil)
