"""History: what the rules see. Plain numbers on the host, a window of the newest, and the model's facts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

STEPS_KEPT = 4096
SAMPLES_KEPT = 512


@dataclass(frozen=True)
class NormFacts:
    """A norm of the model: its name, class, ε (None: it has none), the index of its block (None: outside of the
    blocks), whether its gain is frozen, and whether it is one of omninorm's."""

    name: str
    kind: str
    eps: float | None = None
    block: int | None = None
    frozen: bool = False
    ours: bool = False


@dataclass(frozen=True)
class Facts:
    """What does not change during the run.

    Args:
        model: the model's class.
        parameters: how many numbers it learns or holds.
        blocks: names of the transformer blocks, first to last.
        norms: every norm.
        groups: names of the groups of parameters: the blocks, then the parts beside them.
        attentions: per block the name of its attention, None where none was found.
        feed_forwards: per block the name of the module that ends its feed-forward.
        optimizer: class of the (first) optimizer, or None.
        adam_eps: its ε, if it is one of Adam's kind.
        every: steps between samples.
    """

    model: str = ""
    parameters: int = 0
    blocks: tuple[str, ...] = ()
    norms: tuple[NormFacts, ...] = ()
    groups: tuple[str, ...] = ()
    attentions: tuple[str | None, ...] = ()
    feed_forwards: tuple[str | None, ...] = ()
    optimizer: str | None = None
    adam_eps: float | None = None
    every: int = 1


@dataclass(frozen=True)
class Step:
    """A step, counted from 1. NaN where a value is not known: `loss` may not be given, nor an optimizer."""

    step: int
    loss: float
    grad_norm: float
    lr: float


@dataclass(frozen=True)
class Sample:
    """The signals of a sampled step, by the names of `omninorm.record.signals.SIGNALS`.

    A signal of axis "run" is a list of one number, the others have one per block, norm or group of the Facts, in their
    order; None where there is none. A signal that was not seen is not in the dictionary.
    `worst` names, for "adam_ratio" and "adam_eps_ratio", each group's decisive tensor.
    """

    step: int
    signals: dict[str, Sequence[float | None]]
    worst: dict[str, Sequence[str | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class NonFinite:
    """Where the first NaN or infinity of the run appeared.

    Args:
        step: the step.
        phase: "forward" (a module's output), "loss" (the loss alone), "backward" (a gradient while the loss was
            finite) or "optimizer" (weights that the step's finite gradients made non-finite).
        layer: the module, or the parameter for "backward" and "optimizer"; None for "loss".
        value: "nan" or "inf".
    """

    step: int
    phase: str
    layer: str | None
    value: str


@dataclass
class History:
    """Everything that rules may look at. The newest is last."""

    facts: Facts = field(default_factory=Facts)
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=SAMPLES_KEPT))
    placement: str | None = None
    """As measured at the first sample: "post" where a block's output is a norm's output, "pre" where a norm reads the
    block's input, "both", "none" where the blocks have no norm, None where unknown."""
    dtype: str | None = None
    """Of the stream, such as "float16", as measured at the first sample."""
    nonfinite: NonFinite | None = None
