"""The facts that the checks report with each step and each sample."""

from __future__ import annotations

from dataclasses import dataclass, field

from omninorm.monitor.checks.grids import Grid


@dataclass(frozen=True)
class NoGradient:
    """Modules that ran in a step, and whose trainable parameters got no gradient while others did.

    Args:
        layer: the module to look at: the last one in the order of the forward pass, after which the gradient ends.
        kind: "blocks" (whole blocks), "stack" (one of several stacks of blocks), "last blocks" (those at the end of a
            stack, which may be unused), "most" (half of the weights or more, in a model without blocks), "part" (an
            attention or a feed-forward), "outside" (a module before the blocks), "leaf" (a smaller part of one block),
            "zero" (a block with gradients that are exactly 0), "skipped" (a block that was called, but not its layers).
        parts: the modules, in the order of the model.
        parameters: the number of parameters.
        follows: the next module, which does get a gradient; None if there is none.
    """

    layer: str
    kind: str
    parts: tuple[str, ...]
    parameters: int
    follows: str | None = None


@dataclass(frozen=True)
class Restart:
    """Adam's state began again in the middle of training.

    Args:
        count: its number of steps before; None if the run is resumed and had state before it.
        new: whether another optimizer has taken over.
    """

    count: int | None
    new: bool = False


@dataclass(frozen=True)
class Setup:
    """How training was set up in one step.

    Args:
        trained: whether the model ran with gradients enabled.
        idle: whether the model was not called at all.
        off: "dropout", "BatchNorm" or both, if they were in evaluation mode in all of these passes; else "".
        on: the same for those in training mode in passes without gradients.
        evaluated: the number of such passes.
        proper: whether the model ran in evaluation mode without gradients.
        scaled: whether an enabled GradScaler was passed, and the weights are in float32.
        autocast: whether autocast was active in a pass with gradients; None if there was none.
        inside: whether autocast was looked up inside the model as well, where it may begin.
        betas: Adam's coefficients, for each group of the optimizers that made a step.
        restart: the loss of Adam's state.
        dropout: name and probability of each active nn.Dropout, and of blocks that call F.dropout, in sampled steps.
    """

    trained: bool = False
    idle: bool = False
    off: str = ""
    on: str = ""
    evaluated: int = 0
    proper: bool = False
    scaled: bool = False
    autocast: bool | None = None
    inside: bool = False
    betas: tuple[tuple[float, float], ...] = ()
    restart: Restart | None = None
    dropout: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class StepChecks:
    """Facts about one step.

    Args:
        optimizer: whether an optimizer was passed to `watch`.
        scaler: whether a GradScaler was passed.
        received: whether a parameter had a gradient.
        stepped: whether one of the optimizers made a step.
        emptied: whether the optimizers found no gradient although a backward pass had left some.
        overflowed: the parameter at which scaled gradients were not finite first, so that the scaler skips the step.
        no_gradient: modules without a gradient.
        kept: the norm of some elements of gradients that had not been cleared since the optimizer's previous step, as
            they were before this step's backward pass; None if all had been cleared.
        rates: the learning rates of the groups of the optimizers that made a step.
        moved: whether weights were changed although none of the optimizers made a step.
        batch: a checksum of the model's input tensors; None if it was not computed.
        input: the RMS of the model's floating-point inputs in the first forward pass; None without any.
        before_blocks: name and largest |x| of the modules outside the blocks that ran before the first block.
        setup: how training was set up.
        stale: parameters that had been replaced or added by the time at which the steps were copied to the host; only
            for steps in which no parameter received a gradient.
    """

    optimizer: bool = False
    scaler: bool = False
    received: bool = False
    stepped: bool = False
    emptied: bool = False
    overflowed: str | None = None
    no_gradient: tuple[NoGradient, ...] = ()
    kept: float | None = None
    rates: tuple[float, ...] = ()
    moved: bool = False
    batch: float | None = None
    input: float | None = None
    before_blocks: tuple[tuple[str, float], ...] = ()
    setup: Setup = field(default_factory=Setup)
    stale: Stale | None = None


@dataclass(frozen=True)
class Stale:
    """Parameters that differ from those at the beginning of the watch, by name.

    Args:
        replaced: the name now belongs to another tensor.
        added: the name is new.
        removed: the name is gone.
        unheld: trainable ones among the replaced and added, or all if `foreign`, that none of the optimizers holds.
        foreign: the number of tensors that an optimizer holds although they are no parameters of the model, if the
            model's own tensors of the same shapes are in no optimizer.
    """

    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unheld: tuple[str, ...] = ()
    foreign: int = 0


@dataclass(frozen=True)
class Lost:
    """Weights of 16 bits that have not changed although they have a gradient.

    Args:
        since: the step with whose weights they are compared.
        dtype: their dtype.
        groups: for each group of the Facts, the share of its 16-bit weights that have not changed, or None.
        gains: the same for all norms' gains together.
    """

    since: int
    dtype: str
    groups: tuple[float | None, ...]
    gains: float | None


@dataclass(frozen=True)
class Replica:
    """A process whose weights differ from those of rank 0.

    Args:
        rank: its rank.
        groups: the groups that differ, by name.
        step: the first sampled step at which they differed.
        equal: the last sampled step at which all weights were equal; None if there is none.
    """

    rank: int
    groups: tuple[str, ...]
    step: int
    equal: int | None


@dataclass(frozen=True)
class SampleChecks:
    """Facts about a sampled step.

    Args:
        norms: the norm of the gradient after the backward pass, and at the optimizer's step; None if unknown.
        stale: changed parameters.
        lost: weights that have not changed.
        replicas: processes that differ from rank 0.
        scale: the factor of the GradScaler.
        grids: what the gradients of a few matrices look like at the optimizer's step.
        zeroed: groups whose gradient is exactly 0 at the optimizer's step although the backward pass left one.
    """

    norms: tuple[float, float] | None = None
    stale: Stale | None = None
    lost: Lost | None = None
    replicas: tuple[Replica, ...] = ()
    scale: float | None = None
    grids: tuple[Grid, ...] = ()
    zeroed: tuple[str, ...] = ()
