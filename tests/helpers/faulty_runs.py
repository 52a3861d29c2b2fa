"""Small real trainings, healthy and sick: what was done to each, and what the alarms have to say about it."""

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
from omninorm.watch import Alarm, History, watch
from omninorm.watch.rules import Rule

BATCH, SEQ = 8, 32
EVERY = 5
# A run is lost once its loss has been this far above the healthy one's, or no number, for so many steps running; its
# alarm has to come by the last of them. (Nats per byte, steps.)
LOST, LOST_STEPS = 0.3, 20
# Some are never lost within the few steps of a test; they have to be told so many steps after the illness began.
LATE = 50
Illness = Callable[["Training", int], None]


@dataclass(frozen=True)
class Recipe:
    """A training run of a Thinker on the King James Bible: its shape, its optimizer, and what is wrong with it."""

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
    illness: Illness | None = None


class Training:
    """What an illness can lay its hands on: the model, and the coming step's batch."""

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
        self.noise = 0.0  # added to the embeddings, part of the batch
        self.tokens = torch.empty(0)
        self.step = 0
        self.model.embedding.register_forward_hook(lambda module, inputs, output: output + self.noise)
        if recipe.prepare:
            recipe.prepare(self)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.lr, betas=(0.9, 0.95), eps=recipe.eps, fused=True)


@dataclass
class Outcome:
    """What came of a run."""

    losses: list[float]
    alarms: list[Alarm]
    history: History

    @property
    def fails(self) -> list[Alarm]:
        return [alarm for alarm in self.alarms if alarm.severity == "fail"]


def run(recipe: Recipe, rules: list[Rule] | None = None, every: int = EVERY) -> Outcome:
    """Trains under watch, to the end whatever the alarms say; `rules` as of `watch`."""
    training = Training(recipe)
    losses = []
    with watch(training.model, training.optimizer, every=every, rules=rules) as watched:
        for step in range(1, recipe.steps + 1):
            training.step = step
            training.tokens = windows(corpus(), recipe.seed, step, BATCH, SEQ)
            if recipe.illness:
                recipe.illness(training, step)
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
    """The text as bytes."""
    return torch.frombuffer(bytearray(load_corpus().train), dtype=torch.uint8)


def lost_at(losses: list[float], healthy: list[float]) -> int | None:
    """The step at which a run is lost: its loss was too far above the healthy run's, or no number, too long running."""
    running = 0
    for step, (loss, wanted) in enumerate(zip(losses, healthy, strict=False), start=1):
        running = running + 1 if not loss <= wanted + LOST else 0
        if running == LOST_STEPS:
            return step
    return None


# Illnesses ------------------------------------------------------------------------------------------------------------


def at(step: int, act: Callable[[Training], None]) -> Illness:
    """Acts once, before that step."""
    return lambda training, now: act(training) if now == step else None


@torch.no_grad()
def multiply_weights(training: Training) -> None:
    """One feed-forward's weights × 100."""
    for parameter in training.model.blocks[2].feed_forward.parameters():
        parameter.mul_(100.0)


def nan_in_batch(training: Training, step: int) -> None:
    """A NaN in what the batch of step 60 adds to the embeddings."""
    training.noise = math.nan if step == 60 else 0.0


def overflow(training: Training) -> None:
    """From step 50 on a feed-forward computes in fp16 what is too large for it."""
    down = training.model.blocks[1].feed_forward.down
    hook = lambda module, inputs, output: (output * 1e6).half().float() * 1e-6 if training.step >= 50 else output  # noqa: E731
    down.register_forward_hook(hook)


@torch.no_grad()
def grow_queries(training: Training, step: int) -> None:
    """From step 21 on the queries of a block grow by 15 % at every step."""
    if step > 20:
        training.model.blocks[1].attention.q.weight.mul_(1.15)


def silence(training: Training) -> None:
    """From step 50 on a block adds nothing."""
    block = training.model.blocks[2]
    for part in (block.attention, block.feed_forward):
        part.register_forward_hook(lambda module, inputs, output: output * float(training.step < 50))


def freeze_gain(training: Training) -> None:
    """The gains before one feed-forward are 0, and stay so."""
    gain = training.model.blocks[1].around_feed_forward.norm.weight
    nn.init.zeros_(gain)
    gain.requires_grad_(False)


def corrupt(training: Training, step: int) -> None:
    """Random bytes for 20 steps."""
    if 60 <= step < 80:
        training.tokens = torch.randint(256, training.tokens.shape)


@dataclass(frozen=True)
class SickRun:
    """A run, and what the alarms must say about it.

    Args:
        recipe: the run.
        rules: the first "fail" must come from one of these rules; the first warning where nothing may fail.
        layer: what that alarm must name; None where it is about the whole run.
        begins: the step at which the illness begins; an alarm before it would be a false one.
        fails: whether it is a matter of a "fail".
    """

    recipe: Recipe
    rules: tuple[str, ...]
    layer: str | None = None
    begins: int = 1
    fails: bool = True


STEPS = 80
# What a sick run's loss is compared with: the same batches, and nothing wrong.
HEALTHY_TWIN = Recipe(steps=140)
POST = NormConfig(norm_placement="post")
NONE = NormConfig(normalization="none")
SICK: dict[str, SickRun] = {
    "rate 30 × too high": SickRun(Recipe(steps=STEPS, lr=0.09), ("learning-rate",)),
    "post-norm, 24 blocks, no warm-up": SickRun(
        Recipe(steps=40, width=32, blocks=24, norm=POST, warmup=0), ("post-norm-depth",)
    ),
    "no norm": SickRun(Recipe(steps=40, blocks=8, norm=NONE), ("no-norm",)),
    "weights × 100 at step 50": SickRun(
        Recipe(steps=STEPS, illness=at(50, multiply_weights)), ("layer-jump",), "blocks.2", begins=50
    ),
    "NaN in a batch": SickRun(Recipe(steps=STEPS, illness=nan_in_batch), ("nonfinite",), "embedding", begins=60),
    "fp16 overflow": SickRun(Recipe(steps=STEPS, prepare=overflow), ("nonfinite",), "blocks.1.feed_forward", begins=50),
    "attention logits grow": SickRun(
        Recipe(steps=STEPS, illness=grow_queries), ("attention-logits",), "blocks.1", begins=21
    ),
    "Adam's ε above the gradients": SickRun(Recipe(steps=40, eps=1.0), ("adam-eps",), "blocks.3.attention.q.weight"),
    "dead block": SickRun(Recipe(steps=STEPS, prepare=silence), ("branch-silent",), "blocks.2", begins=50),
    "gain frozen at 0": SickRun(
        Recipe(steps=40, prepare=freeze_gain), ("gain-drift",), "blocks.1.around_feed_forward.norm"
    ),
    "20 corrupted batches": SickRun(
        Recipe(steps=140, illness=corrupt), ("loss-spike", "unrecovered-spike"), begins=60, fails=False
    ),
    "norm ε of 0.1": SickRun(
        Recipe(steps=40, norm=NormConfig(norm_eps=0.1)), ("eps-share",), "blocks.0.around_attention.norm"
    ),
}

SIZES = ((32, 2), (48, 3), (64, 4), (32, 8))
HEALTHY = {
    f"{width} wide, {blocks} blocks, seed {seed}": Recipe(width=width, blocks=blocks, steps=60, seed=seed)
    for width, blocks in SIZES
    for seed in range(5)
}


def complaints(sick: SickRun, outcome: Outcome, healthy: list[float]) -> list[str]:
    """What is wrong with the alarms of a sick run; nothing if the illness was told in time, and rightly."""
    wrong = [f"false alarm at step {alarm.step}: {alarm.rule}" for alarm in outcome.alarms if alarm.step < sick.begins]
    told = outcome.fails if sick.fails else outcome.alarms
    if not told:
        return [*wrong, "not caught"]
    first, lost = told[0], lost_at(outcome.losses, healthy)
    if first.rule not in sick.rules:
        wrong.append(f"the cause was taken to be {first.rule}")
    if first.layer != sick.layer:
        wrong.append(f"the layer was taken to be {first.layer}")
    if first.step > (lost or sick.begins + LATE):
        wrong.append(f"caught at step {first.step}, when it was lost at {lost} or sick since {sick.begins}")
    if not sick.fails and outcome.fails:
        wrong.append(f"called lost by {outcome.fails[0].rule}, but it recovered")
    return wrong


def confusion(outcomes: dict[str, Outcome], healthy: list[float]) -> str:
    """Runs × rules: the step of each rule's first alarm, with "!" where it is a "fail"."""
    names = list(dict.fromkeys(alarm.rule for outcome in outcomes.values() for alarm in outcome.alarms))
    wide = max(map(len, outcomes))
    lines = [" " * wide + "  lost at  " + "  ".join(names)]
    for title, outcome in outcomes.items():
        cells = []
        for name in names:
            own = [alarm for alarm in outcome.alarms if alarm.rule == name]
            fails = [alarm for alarm in own if alarm.severity == "fail"]
            cells.append(f"{fails[0].step}!" if fails else f"{own[0].step}" if own else "·")
        row = "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, names, strict=True))
        lost = lost_at(outcome.losses, healthy) or "·"
        lines.append(f"{title.ljust(wide)}  {lost:>7}  {row}")
    return "\n".join(lines)
