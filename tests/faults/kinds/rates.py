"""Faults of the learning rate: 0, too low, too high, for a part of the model, or after a jump."""

from __future__ import annotations

from faults.faults import block_of, fault
from faults.training import Training

FAMILY = "learning rate"


@fault(
    "learning rate 0 later",
    FAMILY,
    {"learning-rate-zero", "no-progress:Learning rate 0"},
    early=False,
    at_once=True,
    frozen=True,
)
def rate_zero_later(training: Training) -> None:
    """From some step on the schedule returns 0."""
    rate = training.rate
    training.rate = lambda step: 0.0 if training.faulty else rate(step)


@fault(
    "learning rate 0 from the start",
    FAMILY,
    {"learning-rate-zero", "no-progress:Learning rate 0"},
    at_once=True,
    frozen=True,
)
def rate_zero(training: Training) -> None:
    """The warm-up never begins: the learning rate is 0 in every step."""
    training.rate = lambda step: 0.0


@fault(
    "learning rate 1,000 times too low",
    FAMILY,
    {"no-progress:Updates are", "updates-lost", "learning-rate", "learning-rate-low"},
    frozen=True,
)
def rate_low(training: Training) -> None:
    """The learning rate is 1,000 times lower than a good one."""
    training.set(factor=1e-3)


@fault(
    "updates of SGD too small",
    FAMILY,
    {"no-progress:Updates are", "updates-lost", "learning-rate", "learning-rate-low"},
    frozen=True,
    variant="SGD",
)
def rate_low_sgd(training: Training) -> None:
    """SGD gets a learning rate that is meant for Adam."""
    training.set(factor=0.01)


def _factor(name: str, value: float) -> None:
    def inject(training: Training) -> None:
        training.set(factor=value)

    inject.__doc__ = f"The learning rate is {value:g} times a good one."
    fault(name, FAMILY, {"learning-rate"}, frozen=value >= 100.0)(inject)


for _value in (10.0, 30.0, 100.0):
    _factor(f"learning rate × {_value:g}", _value)


@fault("learning rate jumps × 30", FAMILY, {"learning-rate"}, early=False, at_once=True)
def rate_jumps(training: Training) -> None:
    """A resumed run multiplies the learning rate by 30."""
    rate = training.rate
    training.rate = lambda step: rate(step) * (30.0 if training.faulty else 1.0)


@fault("one block's learning rate × 100", FAMILY, {"learning-rate", "odd-block", "layer-jump"}, layered=True)
def rate_of_a_block(training: Training) -> None:
    """The parameters of one block are in a group with a 100 times higher learning rate."""
    block, name = block_of(training)
    training.layers = (name,)
    inside = {id(parameter) for parameter in block.parameters()}
    build = training.build_optimizers

    def build_with_group() -> None:
        build()
        optimizer = training.optimizers[0]
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in inside]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in inside]
                optimizer.param_groups.append({**group, "params": moved, "largest_lr": 100 * group["largest_lr"]})

    training.build_optimizers = build_with_group  # type: ignore[method-assign]
