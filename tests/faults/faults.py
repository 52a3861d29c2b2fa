"""Faults: the registry, and helpers that inject them into any architecture.

Each fault is a function that takes a Training before its optimizers are built, changes it, and stores the names of the
modules at fault in `layers`. The decorator `fault` describes it and names the rules that report its cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from faults.architectures import ARCHITECTURES, Architecture
from faults.training import Training, middle_of
from torch import Tensor, nn

FAMILIES = (
    "gradient flow",
    "optimizer",
    "learning rate",
    "data and labels",
    "numerics",
    "architecture",
    "precision",
    "mixture of experts",
    "training mode",
)
FROZEN = ("lora", "linear-probe")
"""Architectures in which most weights are frozen on purpose."""


LAST_LAYERS = (
    *("out", "o", "o_proj", "out_proj", "c_proj", "dense", "Wo"),
    *("down", "down_proj", "dense_4h_to_h", "wo", "fc2"),
)
"""Names of the layer that writes a sublayer's output."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Args:
        name: a short name.
        family: one of FAMILIES.
        inject: the function that changes a Training.
        causes: the rules that name the cause rightly; "rule:words" if only evidence that begins with these words does.
        early: whether it acts from the first step, otherwise from the middle of the run.
        at_once: whether it is visible in the first step in which it acts.
        layered: whether it has a layer.
        needs: the parts of Layout that an architecture must have.
        only: a further condition on the architecture.
        frozen: whether it applies to models in which most weights are frozen.
        variant: the variant of its run and of its healthy twin.
        first: the first step in which a fault acts that is early, but waits for the first evaluation.
    """

    name: str
    family: str
    inject: Callable[[Training], None]
    causes: frozenset[str]
    early: bool = True
    at_once: bool = False
    layered: bool = False
    needs: tuple[str, ...] = ()
    only: Callable[[Architecture], bool] = lambda architecture: True
    frozen: bool = False
    variant: str = "plain"
    first: int = 1

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return (self.inject.__doc__ or "").strip().splitlines()[0]

    def begins(self, seed: int) -> int:
        """Return the first step at which it acts."""
        return self.first if self.early else middle_of(seed)

    def applies(self, architecture: Architecture) -> bool:
        """Return whether the fault can be injected into the architecture."""
        has_parts = all(getattr(architecture.layout, part) is not None for part in self.needs)
        return has_parts and self.only(architecture) and (self.frozen or architecture.name not in FROZEN)


FAULTS: dict[str, Fault] = {}


def fault(
    name: str, family: str, causes: Iterable[str], **options: Any
) -> Callable[[Callable[[Training], None]], Callable[[Training], None]]:
    """Register a function as a fault."""

    def register(inject: Callable[[Training], None]) -> Callable[[Training], None]:
        # pytest imports modules a second time to look for doctests, so the same function may be registered again.
        known = FAULTS.get(name)
        if family not in FAMILIES or (known and known.inject.__name__ != inject.__name__):
            raise ValueError(f"{name} is registered already, or {family} is not a family")
        FAULTS.setdefault(name, Fault(name, family, inject, frozenset(causes), **options))
        return inject

    return register


def load_faults() -> dict[str, Fault]:
    """Import all kinds of faults and return them by name."""
    from faults.kinds import architecture, data, gradients, modes, numerics, optimizer, rates  # noqa: F401

    return FAULTS


def pairs() -> list[tuple[Fault, Architecture]]:
    """Return every fault with every architecture that it applies to."""
    return [(each, a) for each in load_faults().values() for a in ARCHITECTURES.values() if each.applies(a)]


# Helpers --------------------------------------------------------------------------------------------------------------


def block_of(training: Training, index: int | None = None) -> tuple[nn.Module, str]:
    """Return a block and its name; without an index, the one in the middle."""
    path = training.architecture.layout.blocks
    blocks: Any = training.model.get_submodule(path)
    place = len(blocks) // 2 if index is None else index % len(blocks)
    return blocks[place], f"{path}.{place}"


def part_of(training: Training, part: str, index: int | None = None) -> tuple[nn.Module, str]:
    """Return a part of a block, such as "attention", and its name. If this block lacks it, take the last block."""
    path = getattr(training.architecture.layout, part)
    block, name = block_of(training, index)
    try:
        return block.get_submodule(path), f"{name}.{path}"
    except AttributeError:
        block, name = block_of(training, -1)
        return block.get_submodule(path), f"{name}.{path}"


def last_linear(module: nn.Module) -> nn.Module:
    """Return the linear layer that writes a sublayer's output; the sublayer itself if it has none."""
    if isinstance(module, nn.MultiheadAttention):  # it reads the weight of its last layer without calling it
        return module
    return next((child for name, child in module.named_children() if name in LAST_LAYERS), module)


def norms_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules whose class is named after a norm and that have a gain."""
    kinds = [(name, module) for name, module in model.named_modules() if "Norm" in type(module).__name__]
    return [(name, module) for name, module in kinds if isinstance(getattr(module, "weight", None), nn.Parameter)]


def change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change a module's first output in every forward pass."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    module.register_forward_hook(hook)


def change_branch(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Change a block's first output, given its input and its output."""

    def hook(module: nn.Module, inputs: Any, options: Any, output: Any) -> Any:
        x = inputs[0] if inputs else options["hidden_states"]
        if isinstance(output, tuple):
            return (change(x, output[0]), *output[1:])
        return change(x, output)

    module.register_forward_hook(hook, with_kwargs=True)


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change a module's first input in every forward pass."""

    def hook(module: nn.Module, inputs: Any, options: Any) -> Any:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), options
        return inputs, {**options, "hidden_states": change(options["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


class _ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, through which gradients are multiplied by a factor."""
    scaled: Tensor = _ScaledGradient.apply(x, factor)
    return scaled


def once(training: Training, act: Callable[[], None]) -> None:
    """Do something once, before the first faulty step."""
    training.before.append(lambda: act() if training.step == training.begins else None)


@torch.no_grad()
def multiply(module: nn.Module, factor: float, matrices: bool = True) -> None:
    """Multiply a module's weights in place; only matrices by default."""
    for parameter in module.parameters():
        if parameter.ndim > 1 or not matrices:
            parameter.mul_(factor)
