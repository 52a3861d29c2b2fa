"""Small real trainings, healthy and sick: what was done to each, and what the alarms have to say about it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.experiments.corpus import load_corpus, windows
from omninorm.watch import Alarm, History, watch
from omninorm.watch.rules import Rule

BATCH, SEQ = 8, 32
EVERY = 5
# A loss this far above the healthy run's for this many steps running is lost. (Nats per byte, steps.)
LOST, LOST_STEPS = 0.3, 20
Illness = Callable[["Training", int], None]


@dataclass(frozen=True)
class Recipe:
    """A training run of a Thinker on the King James Bible: its shape, its optimizer, and what is wrong with it."""

    width: int = 48
    blocks: int = 4
    steps: int = 100
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


def run(recipe: Recipe, rules: list[Rule] | None = None) -> Outcome:
    """Trains under watch, to the end whatever the alarms say."""
    training = Training(recipe)
    losses = []
    with watch(training.model, training.optimizer, every=EVERY, rules=rules) as watched:
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
    for parameter in training.model.blocks[2].feed_forward.parameters():
        parameter.mul_(100.0)


def nan_in_batch(training: Training, step: int) -> None:
    training.noise = math.nan if step == 60 else 0.0


def overflow(training: Training) -> None:
    """From step 50 on a feed-forward computes in fp16 what is too large for it."""
    down = training.model.blocks[1].feed_forward.down
    hook = lambda module, inputs, output: (output * 1e6).half().float() * 1e-6 if training.step >= 50 else output  # noqa: E731
    down.register_forward_hook(hook)


@torch.no_grad()
def grow_queries(training: Training, step: int) -> None:
    if step > 30:
        training.model.blocks[1].attention.q.weight.mul_(1.15)


def silence(training: Training) -> None:
    """From step 50 on a block adds nothing."""
    block = training.model.blocks[2]
    for part in (block.attention, block.feed_forward):
        part.register_forward_hook(lambda module, inputs, output: output * float(training.step < 50))


def freeze_gain(training: Training) -> None:
    gain = training.model.blocks[1].around_feed_forward.norm.weight
    nn.init.zeros_(gain)
    gain.requires_grad_(False)


def corrupt(training: Training, step: int) -> None:
    if 60 <= step < 80:
        training.tokens = torch.randint(256, training.tokens.shape)


@dataclass(frozen=True)
class SickRun:
    """A run, its healthy twin, and what the first and most severe alarm must say.

    Args:
        recipe: the run.
        rules: names of rules, one of which must be that of the first "fail".
        layer: what the alarm must name; None where it is the whole run.
        healthy: the run without the illness, by which it is decided when it was lost; the default one if None.
        severity: of the most severe alarm.
        begins: the step before which the alarm would be a false one.
    """

    recipe: Recipe
    rules: tuple[str, ...]
    layer: str | None = None
    healthy: Recipe = Recipe()
    severity: str = "fail"
    begins: int = 1


DEEP = Recipe(width=32, blocks=24, steps=60)
POST = NormConfig(norm_placement="post")
NONE = NormConfig(normalization="none")
SICK: dict[str, SickRun] = {
    "rate 30 × too high": SickRun(Recipe(lr=0.09), ("learning-rate",)),
    "post-norm, 24 blocks, no warm-up": SickRun(replace(DEEP, norm=POST, warmup=0), ("post-norm-depth",), healthy=DEEP),
    "no norm": SickRun(Recipe(blocks=8, steps=60, norm=NONE), ("no-norm",), healthy=Recipe(blocks=8, steps=60)),
    "weights × 100 at step 50": SickRun(
        Recipe(illness=at(50, multiply_weights)), ("layer-jump",), "blocks.2", begins=50
    ),
    "NaN in a batch": SickRun(Recipe(illness=nan_in_batch), ("nonfinite",), "embedding", begins=60),
    "fp16 overflow": SickRun(Recipe(prepare=overflow), ("nonfinite",), "blocks.1.feed_forward.down", begins=50),
    "attention logits grow": SickRun(Recipe(illness=grow_queries), ("attention-logits",), "blocks.1", begins=31),
    "Adam's ε above the gradients": SickRun(Recipe(eps=1.0), ("adam-eps",)),
    "dead block": SickRun(Recipe(prepare=silence), ("branch-silent",), "blocks.2", begins=50),
    "gain frozen at 0": SickRun(Recipe(prepare=freeze_gain), ("gain-drift",), "blocks.1.around_feed_forward.norm"),
    "20 corrupted batches": SickRun(
        Recipe(steps=140, illness=corrupt),
        ("loss-spike", "unrecovered-spike"),
        severity="warn",
        begins=60,
        healthy=Recipe(steps=140),
    ),
    "norm ε of 0.1": SickRun(Recipe(norm=NormConfig(norm_eps=0.1)), ("eps-share",), "blocks.0.around_attention.norm"),
}

SIZES = ((32, 2), (48, 4), (64, 6), (32, 12))
HEALTHY = {
    f"{width} wide, {blocks} blocks, seed {seed}": Recipe(width=width, blocks=blocks, steps=80, seed=seed)
    for width, blocks in SIZES
    for seed in range(5)
}
