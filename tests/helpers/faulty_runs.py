"""Small real trainings, healthy and faulty: the fault injected into each, and the alarms it must raise."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.experiments.corpus import load_corpus, windows
from omninorm.monitor import Alarm, History, watch
from omninorm.monitor.rules import Rule

BATCH, SEQ = 8, 32
EVERY = 5
# A run has diverged once its loss has been this far above the healthy run's (nats per byte), or not finite, for this many
# consecutive steps. Its alarm must be raised by the last of them.
DIVERGED, DIVERGED_STEPS = 0.3, 20
# Faults that do not make a run diverge within a test must be reported within this many steps.
LATE = 50
Fault = Callable[["Training", int], None]


@dataclass(frozen=True)
class Recipe:
    """A training run of a Thinker on the King James Bible: its shape, its optimizer, and its fault."""

    width: int = 48
    blocks: int = 4
    steps: int = 80
    lr: float = 3e-3
    warmup: int = 10
    eps: float = 1e-8
    norm: NormConfig = field(default_factory=NormConfig)
    feed_forward: str = "swiglu"
    seed: int = 0
    prepare: Callable[[Training], None] | None = None
    fault: Fault | None = None


class Training:
    """What a fault can change: the model, and the batch of the next step."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        config = ThinkerConfig(
            d_model=recipe.width,
            n_layers=recipe.blocks,
            n_heads=4,
            max_seq_len=SEQ,
            norm=recipe.norm,
            feed_forward=recipe.feed_forward,
        )
        self.model = Thinker(config)
        self.noise = 0.0  # added to the embeddings
        self.tokens = torch.empty(0)
        self.step = 0
        self.model.embedding.register_forward_hook(lambda module, inputs, output: output + self.noise)
        if recipe.prepare:
            recipe.prepare(self)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.lr, betas=(0.9, 0.95), eps=recipe.eps, fused=True)


@dataclass
class Outcome:
    """The result of a run."""

    losses: list[float]
    alarms: list[Alarm]
    history: History

    @property
    def fails(self) -> list[Alarm]:
        return [alarm for alarm in self.alarms if alarm.severity == "fail"]


def run(recipe: Recipe, rules: list[Rule] | None = None, every: int = EVERY) -> Outcome:
    """Train under watch to the last step, whatever the alarms; `rules` as for `watch`."""
    training = Training(recipe)
    losses = []
    with watch(training.model, training.optimizer, every=every, rules=rules) as watched:
        for step in range(1, recipe.steps + 1):
            training.step = step
            training.tokens = windows(corpus(), recipe.seed, step, BATCH, SEQ)
            if recipe.fault:
                recipe.fault(training, step)
            for group in training.optimizer.param_groups:
                group["lr"] = recipe.lr * min(1.0, step / recipe.warmup if recipe.warmup else 1.0)
            logits = training.model(training.tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), training.tokens[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
            training.optimizer.step()
            training.optimizer.zero_grad()
            watched.step(loss)
            losses.append(loss.item())
    return Outcome(losses, watched.alarms, watched.history)


@functools.cache
def corpus() -> Tensor:
    """Return the text as bytes."""
    return torch.frombuffer(bytearray(load_corpus().train), dtype=torch.uint8)


def diverged_at(losses: list[float], healthy: list[float]) -> int | None:
    """Return the step at which a run has diverged: its loss was too high, or not finite, for too many steps in a row."""
    count = 0
    for step, (loss, expected) in enumerate(zip(losses, healthy, strict=False), start=1):
        count = count + 1 if not loss <= expected + DIVERGED else 0
        if count == DIVERGED_STEPS:
            return step
    return None


# Faults ---------------------------------------------------------------------------------------------------------------


def at(step: int, act: Callable[[Training], None]) -> Fault:
    """Return a fault that is injected once, before that step."""
    return lambda training, now: act(training) if now == step else None


@torch.no_grad()
def multiply_weights(training: Training) -> None:
    """Multiply the weights of one feed-forward by 100."""
    for parameter in training.model.blocks[2].feed_forward.parameters():
        parameter.mul_(100.0)


def nan_in_batch(training: Training, step: int) -> None:
    """Add a NaN to the embeddings of step 60."""
    training.noise = math.nan if step == 60 else 0.0


def overflow(training: Training) -> None:
    """Let a feed-forward overflow fp16 from step 50 on."""
    down = training.model.blocks[1].feed_forward.down
    hook = lambda module, inputs, output: (output * 1e6).half().float() * 1e-6 if training.step >= 50 else output  # noqa: E731
    down.register_forward_hook(hook)


@torch.no_grad()
def grow_queries(training: Training, step: int) -> None:
    """Let the queries of a block grow by 15 % per step from step 21 on."""
    if step > 20:
        training.model.blocks[1].attention.q.weight.mul_(1.15)


def silence(training: Training) -> None:
    """Set the output of a block to 0 from step 50 on."""
    block = training.model.blocks[2]
    for part in (block.attention, block.feed_forward):
        part.register_forward_hook(lambda module, inputs, output: output * float(training.step < 50))


def freeze_gain(training: Training) -> None:
    """Freeze the gains before one feed-forward at 0."""
    gain = training.model.blocks[1].around_feed_forward.norm.weight
    nn.init.zeros_(gain)
    gain.requires_grad_(False)


def corrupt(training: Training, step: int) -> None:
    """Replace the batches of 20 steps by random bytes."""
    if 60 <= step < 80:
        training.tokens = torch.randint(256, training.tokens.shape)


@dataclass(frozen=True)
class FaultyRun:
    """A run and the alarms it must raise.

    Args:
        recipe: the run.
        rules: the first "fail" must come from one of these rules; or the first warning, if the run must not fail.
        layer: the layer that this alarm must name; None for the whole run.
        begins: the first step of the fault; earlier alarms are false alarms.
        fails: whether the run must raise a "fail".
    """

    recipe: Recipe
    rules: tuple[str, ...]
    layer: str | None = None
    begins: int = 1
    fails: bool = True


STEPS = 80
# The reference for the losses of faulty runs: the same batches without a fault.
HEALTHY_TWIN = Recipe(steps=140)
POST = NormConfig(norm_placement="post")
NONE = NormConfig(normalization="none")
FAULTY: dict[str, FaultyRun] = {
    "learning rate 30 × too high": FaultyRun(Recipe(steps=STEPS, lr=0.09), ("learning-rate",)),
    "post-norm, 24 blocks, no warm-up": FaultyRun(
        Recipe(steps=40, width=32, blocks=24, norm=POST, warmup=0), ("post-norm-depth",)
    ),
    "no norm": FaultyRun(Recipe(steps=40, blocks=8, norm=NONE), ("no-norm",)),
    "weights × 100 at step 50": FaultyRun(
        Recipe(steps=STEPS, fault=at(50, multiply_weights)), ("layer-jump",), "blocks.2", begins=50
    ),
    "NaN in a batch": FaultyRun(Recipe(steps=STEPS, fault=nan_in_batch), ("nonfinite",), "embedding", begins=60),
    "fp16 overflow": FaultyRun(
        Recipe(steps=STEPS, prepare=overflow), ("nonfinite",), "blocks.1.feed_forward", begins=50
    ),
    "attention logits grow": FaultyRun(
        Recipe(steps=STEPS, fault=grow_queries), ("attention-logits",), "blocks.1", begins=21
    ),
    "Adam's ε above the gradients": FaultyRun(Recipe(steps=40, eps=1.0), ("adam-eps",), "blocks.3.attention.q.weight"),
    "silent block": FaultyRun(Recipe(steps=STEPS, prepare=silence), ("branch-silent",), "blocks.2", begins=50),
    "gain frozen at 0": FaultyRun(
        Recipe(steps=40, prepare=freeze_gain), ("gain-drift",), "blocks.1.around_feed_forward.norm"
    ),
    "20 corrupted batches": FaultyRun(
        Recipe(steps=140, fault=corrupt), ("loss-spike", "unrecovered-spike"), begins=60, fails=False
    ),
    "norm ε of 0.1": FaultyRun(
        Recipe(steps=40, norm=NormConfig(norm_eps=0.1)), ("eps-share",), "blocks.0.around_attention.norm"
    ),
}

SIZES = ((32, 2), (48, 3), (64, 4), (32, 8))
HEALTHY = {
    f"{width} wide, {blocks} blocks, seed {seed}": Recipe(width=width, blocks=blocks, steps=60, seed=seed)
    for width, blocks in SIZES
    for seed in range(5)
}


def complaints(faulty: FaultyRun, outcome: Outcome, healthy: list[float]) -> list[str]:
    """Return what is wrong with the alarms of a faulty run; nothing if the fault was reported correctly and in time."""
    wrong = [
        f"false alarm at step {alarm.step}: {alarm.rule}" for alarm in outcome.alarms if alarm.step < faulty.begins
    ]
    alarms = outcome.fails if faulty.fails else outcome.alarms
    if not alarms:
        return [*wrong, "not caught"]
    first, diverged = alarms[0], diverged_at(outcome.losses, healthy)
    if first.rule not in faulty.rules:
        wrong.append(f"reported cause: {first.rule}")
    if first.layer != faulty.layer:
        wrong.append(f"reported layer: {first.layer}")
    if first.step > (diverged or faulty.begins + LATE):
        wrong.append(f"reported at step {first.step}; the run diverged at {diverged}, faulty since {faulty.begins}")
    if not faulty.fails and outcome.fails:
        wrong.append(f"{outcome.fails[0].rule} failed, but the run recovered")
    return wrong


def confusion(outcomes: dict[str, Outcome], healthy: list[float]) -> str:
    """Return a table of runs × rules: the step of each rule's first alarm, with "!" for a "fail"."""
    names = list(dict.fromkeys(alarm.rule for outcome in outcomes.values() for alarm in outcome.alarms))
    wide = max(map(len, outcomes))
    lines = [" " * wide + "  diverged  " + "  ".join(names)]
    for title, outcome in outcomes.items():
        cells = []
        for name in names:
            own = [alarm for alarm in outcome.alarms if alarm.rule == name]
            fails = [alarm for alarm in own if alarm.severity == "fail"]
            cells.append(f"{fails[0].step}!" if fails else f"{own[0].step}" if own else "·")
        row = "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, names, strict=True))
        diverged = diverged_at(outcome.losses, healthy) or "·"
        lines.append(f"{title.ljust(wide)}  {diverged:>8}  {row}")
    return "\n".join(lines)
