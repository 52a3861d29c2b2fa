"""History: the data that rules read. Plain numbers of the latest steps and samples, and facts about the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from omninorm.monitor.checks.facts import SampleChecks, StepChecks

STEPS_KEPT = 4096
SAMPLES_KEPT = 512


@dataclass(frozen=True)
class NormFacts:
    """A norm of the model: its name, class, ε (None if it has none), the index of its block (None outside the blocks),
    whether its gain is frozen, and whether it is an omninorm norm."""

    name: str
    kind: str
    eps: float | None = None
    block: int | None = None
    frozen: bool = False
    ours: bool = False


@dataclass(frozen=True)
class Facts:
    """Facts that do not change during the run.

    Args:
        model: the class of the model.
        parameters: the number of elements of all parameters.
        blocks: names of the transformer blocks, first to last.
        norms: every norm.
        groups: names of the parameter groups: the blocks, then the parts outside them.
        attentions: for each block the name of its attention; None if none was found.
        feed_forwards: for each block the name of the last module of its feed-forward.
        routers: for each block the name of the layer that assigns tokens to experts; None without experts.
        chains: the indices of blocks that follow each other, for each tower, stage, encoder or decoder.
        optimizer: class of the (first) optimizer, or None.
        adam_eps: its ε, if it is a variant of Adam.
        every: steps between samples.
        width: the width of the blocks: the median of the smaller sides of their matrices, or None.
        alike: a number for each block, equal for blocks of the same class with the same matrices.
        fresh: whether the weights look like a random initialization; None if unknown.
        precision: the dtype of 16 bits that the run's settings ask for, such as "bfloat16"; None if they do not.
    """

    model: str = ""
    parameters: int = 0
    blocks: tuple[str, ...] = ()
    norms: tuple[NormFacts, ...] = ()
    groups: tuple[str, ...] = ()
    attentions: tuple[str | None, ...] = ()
    feed_forwards: tuple[str | None, ...] = ()
    routers: tuple[str | None, ...] = ()
    chains: tuple[tuple[int, ...], ...] = ()
    optimizer: str | None = None
    adam_eps: float | None = None
    every: int = 1
    width: float | None = None
    alike: tuple[int, ...] = ()
    fresh: bool | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Step:
    """A step, counted from 1. Unknown values are NaN, such as the loss if none was passed. `checks` holds what is known
    exactly about it."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    checks: StepChecks | None = None


@dataclass(frozen=True)
class Load:
    """The load of a block's experts: for each the share of the tokens that chose it, the number of tokens, and how many
    experts each token chooses."""

    shares: tuple[float, ...]
    tokens: int
    choices: int


@dataclass(frozen=True)
class Sample:
    """The signals of a sampled step, by the names of `omninorm.record.signals.SIGNALS`.

    A signal of axis "run" is a list of one number; the others have one number per block, norm or group of the Facts, in
    that order, or None. A signal that was not measured is not in the dictionary.
    `worst` names each group's worst tensor for "adam_ratio" and "adam_eps_ratio". `decay` is learning rate × weight
    decay of the optimizer, the share that decoupled weight decay removes per step: the largest of each group's
    matrices. `gain_decay` is the same for the gain of each norm. Both are empty if no optimizer is known.
    `probabilities` is 1 if each row that cross entropy received is a probability distribution, 0 if not, and None if no
    such call was measured. `loads` has the load of each block's experts, or None, if there are any. `next_tokens` is
    the share of labels that are the next token of the input, `shifted_tokens` the largest share at another distance of
    up to 4 tokens, and `same_tokens` the share of labels that also occur among the input's tokens as often.
    `visible_future` is the share of later tokens that attention shows to a token, for each block. All are None if
    unknown.
    """

    step: int
    signals: dict[str, Sequence[float | None]]
    worst: dict[str, Sequence[str | None]] = field(default_factory=dict)
    checks: SampleChecks = field(default_factory=SampleChecks)
    decay: Sequence[float | None] = ()
    gain_decay: Sequence[float | None] = ()
    probabilities: float | None = None
    loads: Sequence[Load | None] = ()
    next_tokens: float | None = None
    shifted_tokens: float | None = None
    same_tokens: float | None = None
    visible_future: Sequence[float | None] = ()
    finite: dict[str, list[float | None]] = field(init=False, repr=False, compare=False, default_factory=dict)
    """The values that several rules read: see `omninorm.monitor.rules.numbers.values_of`."""


@dataclass(frozen=True)
class Evaluation:
    """A held-out loss that was passed to `Watch.log_eval`, after `step` steps."""

    step: int
    name: str
    loss: float


@dataclass(frozen=True)
class NonFinite:
    """The place where the first NaN or infinity of the run appeared.

    Args:
        step: the step.
        phase: "forward" (a module's output), "loss" (the loss alone), "backward" (a gradient while the loss was
            finite) or "optimizer" (weights that the step's finite gradients made non-finite).
        layer: the module, or the parameter for "backward" and "optimizer"; None for "loss".
        value: "nan" or "inf".
        after: for "forward", the module whose output, the last checked one before it, was finite; None if there is
            none. The value appeared in the module or between the two.
    """

    step: int
    phase: str
    layer: str | None
    value: str
    after: str | None = None


@dataclass
class History:
    """All data that rules may read. The newest item is last."""

    facts: Facts = field(default_factory=Facts)
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=SAMPLES_KEPT))
    placement: str | None = None
    """Measured at the first sample, from most blocks: "pre" if norms read the stream before each branch, "reordered" if
    they normalize what is added to it, "sandwich" for both, "post" if they normalize the sum, "both" for pre and post,
    "none" if the blocks have no norm, None if unknown."""
    placement_reason: str = ""
    """The reason why the placement is unknown."""
    no_residual: bool = False
    """Whether no block's output is a sum with its input, according to the autograd graph of the first sample."""
    without_input: tuple[int, ...] = ()
    """Blocks that do not add their input to what they return, although most of the other blocks of their chain do,
    according to the autograd graph of the first sample."""
    padding: str | None = None
    """How padding was recognized, so that it does not count: "attention mask", "zero rows", or None without any."""
    dtype: str | None = None
    """The dtype of the residual stream, such as "float16", measured at the first sample."""
    classes: int | None = None
    """The number of classes that cross entropy received at the first sample, such as the vocabulary."""
    nonfinite: NonFinite | None = None
    evaluations: deque[Evaluation] = field(default_factory=lambda: deque(maxlen=SAMPLES_KEPT))
    passes: int = 1
    """The largest number of backward passes in one step: more than 1 with gradient accumulation."""
