"""Faults of the optimizer: what it holds, when it steps, and its settings."""

from __future__ import annotations

import copy

import torch
from faults.faults import block_of, fault, norms_of, once
from faults.training import Training
from torch import nn

FAMILY = "optimizer"


@fault("zero_grad missing", FAMILY, {"gradients-not-cleared"}, at_once=True, frozen=True)
def zero_grad_missing(training: Training) -> None:
    """Gradients are never cleared, so they add up (a case of TrainCheck)."""
    training.clear = lambda: None


@fault("zero_grad before step", FAMILY, {"no-gradient", "steps-skipped", "updates-lost"}, at_once=True, frozen=True)
def zero_grad_before_step(training: Training) -> None:
    """Gradients are cleared between the backward pass and the optimizer's step."""
    training.after_backward.append(lambda: training._clear())


@fault(
    "step missing",
    FAMILY,
    {"steps-skipped", "stale-parameters", "updates-lost"},
    early=False,
    at_once=True,
    frozen=True,
)
def step_missing(training: Training) -> None:
    """From some step on, the optimizer does not step, like a compiled step that skips it (a case of TrainCheck)."""
    update = training.update
    training.update = lambda: None if training.faulty else update()


@fault("half of the blocks in no optimizer", FAMILY, {"optimizer-coverage"}, at_once=True, layered=True)
def partial_groups(training: Training) -> None:
    """The optimizer holds only half of the blocks (a case of TrainCheck)."""
    _, name = block_of(training)
    blocks, middle = training.architecture.layout.blocks, int(name.rsplit(".", 1)[1])
    training.layers = tuple(f"{blocks}.{index}" for index in range(middle))
    prefixes = tuple(f"{layer}." for layer in training.layers)
    training.trained = lambda name, parameter: not name.startswith(prefixes)


@fault("norm gains in no optimizer", FAMILY, {"optimizer-coverage"}, at_once=True, layered=True, needs=("norm",))
def gains_left_out(training: Training) -> None:
    """The parameter groups leave out the norms."""
    training.layers = tuple(name for name, _ in norms_of(training.model))
    prefixes = tuple(f"{layer}." for layer in training.layers)
    training.trained = lambda name, parameter: not name.startswith(prefixes)


@fault("optimizer of a copy", FAMILY, {"optimizer-coverage", "stale-parameters"}, at_once=True, frozen=True)
def optimizer_of_a_copy(training: Training) -> None:
    """The optimizer was built from another copy of the model."""
    build = training.build_optimizers

    def build_from_copy() -> None:
        model, training.model = training.model, copy.deepcopy(training.model)
        build()
        training.model = model

    training.build_optimizers = build_from_copy  # type: ignore[method-assign]


@fault("block replaced", FAMILY, {"stale-parameters", "optimizer-coverage"}, early=False, at_once=True, layered=True)
def block_replaced(training: Training) -> None:
    """A block is replaced by a copy in the middle of the run; the optimizer still holds the old one."""
    block, name = block_of(training)
    path, index = name.rsplit(".", 1)
    training.layers = (name,)

    def replace() -> None:
        blocks: nn.ModuleList = training.model.get_submodule(path)  # type: ignore[assignment]
        blocks[int(index)] = copy.deepcopy(block)

    once(training, replace)


@fault("tie broken", FAMILY, {"optimizer-coverage", "stale-parameters"}, at_once=True, layered=True, needs=("head",),
       only=lambda a: a.name in ("nanogpt", "gpt2", "gpt2-256", "bert", "gemma2", "gemma3", "t5"))  # fmt: skip
def tie_broken(training: Training) -> None:
    """The head's weight is a copy of the embedding's, made after the optimizer was built."""
    head = training.architecture.layout.head
    assert head is not None
    build = training.build_optimizers
    training.layers = (head,)

    def build_then_untie() -> None:
        build()
        layer = training.model.get_submodule(head)
        layer.weight = nn.Parameter(layer.weight.detach().clone())  # type: ignore[operator]

    training.build_optimizers = build_then_untie  # type: ignore[method-assign]


@fault("weight decay 20", FAMILY, {"weights-vanish"})
def decay_matrices(training: Training) -> None:
    """Weight decay is 20 for all matrices."""
    training.set(decay=20.0)


@fault("weight decay 50 on gains", FAMILY, {"weights-vanish", "gain-drift"}, needs=("norm",))
def decay_gains(training: Training) -> None:
    """Weight decay is 50, and only for the norms' gains."""
    gains = {id(p) for _, norm in norms_of(training.model) for p in norm.parameters()}
    build = training.build_optimizers

    def build_with_decay() -> None:
        build()
        groups = [dict(group) for optimizer in training.optimizers for group in optimizer.param_groups]
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in gains]} for group in groups]
        decayed = {**groups[0], "params": [p for g in groups for p in g["params"] if id(p) in gains]}
        decayed["weight_decay"] = 50.0
        optimizer = torch.optim.AdamW([g for g in rest if g["params"]] + [decayed], betas=training.options.betas)
        training.optimizers = [optimizer]

    training.build_optimizers = build_with_decay  # type: ignore[method-assign]


@fault("Adam's ε 1", FAMILY, {"adam-eps"}, at_once=True, frozen=True)
def large_eps(training: Training) -> None:
    """Adam's ε is 1, far above the gradients."""
    training.set(eps=1.0)


@fault("Adam's ε 1e-2", FAMILY, {"adam-eps"}, frozen=True)
def medium_eps(training: Training) -> None:
    """Adam's ε is 0.01, above most gradients."""
    training.set(eps=1e-2)


@fault("betas swapped", FAMILY, {"adam-underestimation", "learning-rate", "adam-betas"}, frozen=True)
def betas_swapped(training: Training) -> None:
    """Adam's betas are (0.999, 0.5): its second moment forgets faster than its first."""
    training.set(betas=(0.999, 0.5))


@fault("β₂ 0.5", FAMILY, {"adam-underestimation", "adam-betas"}, frozen=True)
def short_memory(training: Training) -> None:
    """Adam's second moment is a mean over two steps."""
    training.set(betas=(0.9, 0.5))


@fault("Adam's state lost", FAMILY, {"adam-underestimation", "adam-state"}, early=False, frozen=True)
def state_lost(training: Training) -> None:
    """From some step on, the optimizer is built again before each step, so it has no memory."""

    def forget() -> None:
        for optimizer in training.optimizers:
            if training.faulty:
                optimizer.state.clear()

    training.before.append(forget)


@fault("clipped to 1e-3", FAMILY, {"gradient-clipped"}, frozen=True, variant="SGD")
def clipped(training: Training) -> None:
    """SGD's gradients are clipped to a norm of 1e-3."""
    training.set(clip=1e-3)


@fault("clipped to 1e-12", FAMILY, {"gradient-clipped", "adam-eps"}, at_once=True, frozen=True)
def clipped_to_nothing(training: Training) -> None:
    """Adam's gradients are clipped to a norm of 1e-12."""
    training.set(clip=1e-12)


@fault(
    "micro-batches summed",
    FAMILY,
    {"learning-rate", "gradient-clipped", "accumulation"},
    frozen=True,
    variant="SGD, four micro-batches",
)
def accumulation_not_divided(training: Training) -> None:
    """The gradients of four micro-batches are summed instead of averaged, and not clipped."""
    training.divided = lambda loss: loss  # type: ignore[method-assign]
