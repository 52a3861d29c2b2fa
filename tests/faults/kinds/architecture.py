"""Faults of the architecture: residuals, norms, scales, initialization, dead parts, and mixtures of experts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from faults.faults import (
    block_of,
    change_branch,
    change_output,
    fault,
    last_linear,
    multiply,
    norms_of,
    once,
    part_of,
)
from faults.plain_models import SPREAD
from faults.training import Training
from torch import Tensor, nn

FAMILY = "architecture"
ODD = {"odd-block", "layer-jump"}
ZERO_CENTRED = ("gemma2", "gemma3", "qwen3-next")
"""Architectures whose norms multiply by 1 + weight."""


def _has_residual(architecture: object) -> bool:
    return bool(architecture.layout.residual)  # type: ignore[attr-defined]


@fault("residual dropped in a block", FAMILY, {"odd-block", "residual-missing"}, layered=True, only=_has_residual)
def residual_dropped(training: Training) -> None:
    """One block returns its branches only, without its input."""
    block, name = block_of(training)
    training.layers = (name,)
    change_branch(block, lambda x, y: y - x)


@fault("residual dropped everywhere", FAMILY, {"residual-missing", "depth-growth"}, only=_has_residual)
def all_residuals_dropped(training: Training) -> None:
    """Every block returns its branches only."""
    for block in training.model.get_submodule(training.architecture.layout.blocks).children():
        change_branch(block, lambda x, y: y - x)


@fault("block's branch × 30", FAMILY, {*ODD, "massive-activation", "depth-growth"}, layered=True, only=_has_residual)
def branch_too_large(training: Training) -> None:
    """One block adds 30 times its branches to the stream."""
    block, name = block_of(training)
    training.layers = (name,)
    change_branch(block, lambda x, y: x + 30.0 * (y - x))


@fault("block does nothing", FAMILY, {"branch-silent", "odd-block", "no-gradient"}, layered=True, only=_has_residual)
def block_skipped(training: Training) -> None:
    """One block returns its input."""
    block, name = block_of(training)
    training.layers = (name,)
    change_branch(block, lambda x, y: x + 0.0 * (y - x))


@fault(
    "attention silent later",
    FAMILY,
    {"branch-silent", "odd-block"},
    early=False,
    at_once=True,
    layered=True,
    needs=("attention",),
)
def attention_silent(training: Training) -> None:
    """In the middle of the run the output of one block's attention becomes 0."""
    attention, name = part_of(training, "attention")
    training.layers = (name,)
    change_output(last_linear(attention), lambda y: y * 0.0 if training.faulty else y)


@fault(
    "feed-forward silent later",
    FAMILY,
    {"branch-silent", "odd-block"},
    early=False,
    at_once=True,
    layered=True,
    needs=("feed_forward",),
)
def feed_forward_silent(training: Training) -> None:
    """In the middle of the run the output of one block's feed-forward becomes 0."""
    feed_forward, name = part_of(training, "feed_forward")
    training.layers = (name,)
    change_output(last_linear(feed_forward), lambda y: y * 0.0 if training.faulty else y)


@fault(
    "norm's gain 0 later",
    FAMILY,
    {"gain-drift", "branch-silent", "odd-block", "weights-vanish"},
    early=False,
    at_once=True,
    layered=True,
    needs=("norm",),
)
def gain_zero(training: Training) -> None:
    """In the middle of the run the gains of one norm become 0 and stay there."""
    norm, name = part_of(training, "norm")
    training.layers = (name, block_of(training)[1])
    offset = -1.0 if training.architecture.name in ZERO_CENTRED else 0.0

    @torch.no_grad()
    def reset() -> None:
        if training.faulty:
            for parameter in norm.parameters():
                parameter.fill_(offset if parameter is getattr(norm, "weight", None) else 0.0)

    training.before.append(reset)


@fault(
    "norm's output × 30",
    FAMILY,
    {*ODD, "attention-logits", "attention-entropy", "massive-activation"},
    layered=True,
    needs=("norm",),
)
def norm_too_large(training: Training) -> None:
    """The output of one norm is 30 times too large."""
    norm, name = part_of(training, "norm")
    training.layers = (name, block_of(training)[1])
    change_output(norm, lambda y: 30.0 * y)


@fault("gains applied twice", FAMILY, {"gain-drift", "gain-scale"}, needs=("norm",))
def gains_twice(training: Training) -> None:
    """Every norm adds 1 to gains that are 1 already, as after a wrong conversion."""
    for _, norm in norms_of(training.model):
        if training.architecture.name in ZERO_CENTRED:  # they add 1 anyway
            nn.init.ones_(norm.weight)  # type: ignore[arg-type]
        else:
            norm.__class__ = _shifted(type(norm))


@functools.cache
def _shifted(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a norm that multiplies by 1 + weight instead of by weight."""

    def forward(self: nn.Module, *inputs: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        self._parameters["weight"] = weight + 1.0  # type: ignore[assignment, operator]
        try:
            output: Tensor = kind.forward(self, *inputs)
        finally:
            self._parameters["weight"] = weight
        return output

    return type(f"Shifted{kind.__name__}", (kind,), {"forward": forward})


@fault("norm missing in a block", FAMILY, {"no-norm", "odd-block", "norm-missing"}, layered=True, needs=("norm",))
def norm_missing(training: Training) -> None:
    """One block has no norms."""
    block, name = block_of(training)
    training.layers = (name,)
    _remove_norms(block)


@fault("no norm", FAMILY, {"no-norm", "depth-growth"}, needs=("norm",))
def no_norm(training: Training) -> None:
    """The model has no norm at all."""
    _remove_norms(training.model)


def _remove_norms(module: nn.Module) -> None:
    for name, _ in norms_of(module):
        path, _, last = name.rpartition(".")
        setattr(module.get_submodule(path), last, Skipped(module.get_submodule(name)))


class Skipped(nn.Module):
    """Returns its input. It has a norm's attributes, because some models read them."""

    eps, bias = 0.0, None

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones_like(norm.weight))  # type: ignore[arg-type]

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x


@fault("ε of the norms 1", FAMILY, {"eps-share"}, layered=True, needs=("norm",))
def large_eps(training: Training) -> None:
    """The ε of every norm is 1."""
    found = norms_of(training.model)
    training.layers = tuple(name for name, _ in found)
    for _, norm in found:
        _set_eps(norm, 1.0)


def _set_eps(norm: nn.Module, eps: float) -> None:
    for attribute in ("eps", "variance_epsilon"):
        if hasattr(norm, attribute):
            setattr(norm, attribute, eps)


@fault("weights × 100 later", FAMILY, {"layer-jump", "odd-block"}, early=False, at_once=True, layered=True)
def weights_jump(training: Training) -> None:
    """In the middle of the run the matrices of one block are multiplied by 100."""
    block, name = block_of(training)
    training.layers = (name,)
    once(training, lambda: multiply(block, 100.0))


@fault(
    "initialization × 10",
    FAMILY,
    {"initialization", "attention-logits", "attention-entropy", "logz", "massive-activation"},
)
def initialization(training: Training) -> None:
    """All matrices start 10 times larger than is customary."""
    matrices = [p.detach().square().mean().sqrt() for p in training.model.parameters() if p.ndim > 1]
    customary = SPREAD / (training.options.width or training.architecture.width) ** 0.5
    multiply(training.model, 10.0 * max(1.0, customary / float(torch.stack(matrices).median())))


@fault("one block's initialization × 20", FAMILY, {*ODD, "attention-logits", "attention-entropy"}, layered=True)
def block_initialization(training: Training) -> None:
    """The matrices of one block start 20 times too large."""
    block, name = block_of(training)
    training.layers = (name,)
    multiply(block, 20.0)


@fault(
    "initialized to 0",
    FAMILY,
    {"branch-silent", "no-gradient", "initialization", "weights-vanish", "odd-block"},
    layered=True,
)
def initialized_to_zero(training: Training) -> None:
    """All matrices of one block start at 0, so none of them ever gets a gradient."""
    block, name = block_of(training)
    training.layers = (name,)
    multiply(block, 0.0)


@fault("dead units", FAMILY, {"dead-units", "branch-silent", "odd-block"}, layered=True, needs=("hidden",))
def dead_units(training: Training) -> None:
    """The biases of one feed-forward's hidden units are −50, so none of them is ever active."""
    hidden, _ = part_of(training, "hidden")
    training.layers = (block_of(training)[1],)
    nn.init.constant_(hidden.bias, -50.0)  # type: ignore[arg-type]


@fault(
    "embeddings × 1,000 later",
    FAMILY,
    {"layer-jump", "massive-activation", "branch-silent", "embedding-scale"},
    early=False,
    at_once=True,
)
def embeddings_jump(training: Training) -> None:
    """In the middle of the run the output of the embedding becomes 1,000 times larger."""
    embedding = training.model.get_submodule(training.architecture.layout.embedding)
    change_output(embedding, lambda y: 1000.0 * y if training.faulty else y)


# Mixtures of experts --------------------------------------------------------------------------------------------------

COLLAPSE = {"router-collapse", "dead-experts", "expert-load", "odd-block"}


@fault(
    "router collapses", "mixture of experts", {*COLLAPSE, "no-gradient"}, early=False, layered=True, needs=("router",)
)
def router_collapse(training: Training) -> None:
    """From some step on one block's router sends every token to the same two of four experts."""
    _redirect(training, {2: 0, 3: 1}, later=True)


@fault("expert dead", "mixture of experts", {*COLLAPSE, "no-gradient", "dead-units"}, layered=True, needs=("router",))
def expert_dead(training: Training) -> None:
    """The router of one block never chooses one of its experts."""
    _redirect(training, {3: 0}, later=False)


def _redirect(training: Training, experts: dict[int, int], later: bool) -> None:
    """Send the tokens of some experts to others."""
    router, name = part_of(training, "router")
    training.layers = (name, name.rpartition(".")[0])

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if later and not training.faulty:
            return output
        chosen = output[-1]
        for old, new in experts.items():
            chosen = chosen.masked_fill(chosen == old, new)
        return (*output[:-1], chosen)

    router.register_forward_hook(hook)
