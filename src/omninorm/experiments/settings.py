"""TrainConfig, which checks all settings of a training run, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from omninorm.config import check_choice, check_count, check_keys, check_number, store_python_numbers
from omninorm.errors import ConfigError
from omninorm.experiments.precision import PRECISIONS, SHORT

SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
# The range of float32, the dtype of the weights: beyond it a number becomes 0 or infinite.
_SMALLEST, _LARGEST = 1e-38, 3e38
_MOST_STEPS = 10**12


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run. The defaults suit a small byte-level model on two CPU cores.

    Args:
        steps: optimizer steps, from 1 to 10¹².
        batch_size: sequences per micro-batch; a step has batch_size · grad_accumulation sequences.
        seq_len: tokens per sequence.
        lr: the peak learning rate, reached at the end of the warm-up, in [1e-38, 3e38].
        warmup_steps: steps of linear warm-up, at most `steps`; None means a tenth of the steps, at most 100.
        schedule: "cosine" falls to min_lr_ratio · lr at the last step; "constant" stays at lr.
        min_lr_ratio: final learning rate as a fraction of lr, in [0, 1].
        optimizer: "adamw", or "muon" for the matrices between the embeddings and the output layer, with AdamW for the
            other parameters; both have the learning rate `lr`.
        weight_decay: the optimizer's decoupled weight decay, ≥ 0; `omninorm.param_groups` selects its parameters.
        decay_norms: decay the gains of norms too; meant for zero-centred gains (gain_offset=1), which it pulls to 1.
        betas: AdamW's betas, each in [0, 1).
        adam_eps: AdamW's ε, in [1e-38, 3e38].
        grad_clip: the total gradient norm to which gradients are clipped, in [1e-38, 3e38]; None disables clipping.
        grad_accumulation: micro-batches per step. More micro-batches need less memory; the sequences of a step stay the
            same if batch_size · grad_accumulation does.
        precision: "float32", or "bfloat16" or "float16" for autocast, where parameters, moments and the loss stay in
            float32, and float16 scales the loss. "auto" depends on the device, see `choose_precision`. The short names
            "fp32", "bf16" and "fp16" are also accepted.
        compile: whether the model is compiled with torch.compile.
        tf32: whether NVIDIA GPUs round the factors of float32 matrix products to TF32.
        seed: random seed for weights and batches, ≥ 0.
        eval_every: steps between evaluations on the held-out text; step 0 and the last step are always evaluated.
        eval_bytes: bytes of the held-out text to evaluate, from its start; None means all.
        checkpoint_every: steps between checkpoints; the last step always gets one.
        keep_checkpoints: number of newest checkpoints to keep, ≥ 1.
        log_every: record every n-th step; the last step is always recorded.
        watch_every: steps between samples of `omninorm.watch`, for runs with a folder; None disables monitoring.

    Raises:
        ConfigError: a value of the wrong type, out of range, NaN or infinite.
    """

    steps: int = 600
    batch_size: int = 16
    seq_len: int = 128
    lr: float = 3e-3
    warmup_steps: int | None = None
    schedule: str = "cosine"
    min_lr_ratio: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    decay_norms: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    grad_clip: float | None = 1.0
    grad_accumulation: int = 1
    precision: str = "auto"
    compile: bool = False
    tf32: bool = False
    seed: int = 0
    eval_every: int = 100
    eval_bytes: int | None = 65536
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 1
    watch_every: int | None = 10

    def __post_init__(self) -> None:
        store_python_numbers(self)
        for name in ("steps", "batch_size", "seq_len", "grad_accumulation", "eval_every"):
            check_count(name, getattr(self, name))
        if self.steps > _MOST_STEPS:
            raise ConfigError("A run can have at most 10¹² steps", f"steps={self.steps!r:.40}", "use fewer steps")
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            check_count(name, getattr(self, name))
        if self.watch_every is not None:
            check_count("watch_every", self.watch_every)
        check_seed(self.seed)
        if self.eval_bytes is not None:
            check_count("eval_bytes", self.eval_bytes, at_least=2)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if isinstance(self.precision, str):
            object.__setattr__(self, "precision", SHORT.get(self.precision, self.precision))
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("compile", "tf32", "decay_norms"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False", f"{getattr(self, name)!r:.60}", "choose one of them")
        self._check_numbers()
        self._check_warmup()

    def _check_numbers(self) -> None:
        default = type(self)
        _check_positive("lr", self.lr, default.lr)
        check_number("min_lr_ratio", self.min_lr_ratio, at_least=0.0, at_most=1.0, example=default.min_lr_ratio)
        check_number("weight_decay", self.weight_decay, at_least=0.0, example=default.weight_decay)
        _check_positive("adam_eps", self.adam_eps, default.adam_eps)
        if self.grad_clip is not None:
            _check_positive("grad_clip", self.grad_clip, default.grad_clip)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ConfigError("betas must be two numbers in [0, 1)", repr(self.betas), "pass for example (0.9, 0.95)")
        for beta in self.betas:
            check_number("Each of betas", beta, at_least=0.0, at_most=math.nextafter(1.0, 0.0), example=0.9)
        object.__setattr__(self, "betas", tuple(self.betas))

    def _check_warmup(self) -> None:
        if self.warmup_steps is None:
            return
        check_count("warmup_steps", self.warmup_steps, at_least=0)
        if self.warmup_steps > self.steps:
            received = f"warmup_steps={self.warmup_steps} with steps={self.steps}"
            raise ConfigError(
                "The warm-up must end within the run", received, "use fewer warmup_steps, or leave them out"
            )

    @property
    def warmup(self) -> int:
        """Number of warm-up steps, with the default filled in."""
        return min(self.steps // 10, 100) if self.warmup_steps is None else self.warmup_steps

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accumulation * self.seq_len

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the config that a dictionary such as `to_dict`'s describes; missing keys get their defaults.

        Raises:
            ConfigError: `values` is not a mapping, or has an unknown key (the message lists the known ones) or an
                invalid value.
        """
        check_keys("a training config", values, [field.name for field in fields(cls)])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a JSON-serializable dictionary."""
        return {**asdict(self), "betas": list(self.betas)}


def check_seed(seed: object) -> None:
    """Raise ConfigError unless torch's generators accept `seed`: an integer in [0, 2⁶³)."""
    check_count("seed", seed, at_least=0)
    check_number("seed", seed, at_most=2**63 - 1)


def _check_positive(name: str, value: object, example: float | None) -> None:
    check_number(name, value, above=0.0, example=example)
    check_number(name, value, at_least=_SMALLEST, at_most=_LARGEST, example=example)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 1.

    η(s) = lr · s/w during the w steps of warm-up, so η(w) = lr. Then "constant" stays at lr, and "cosine" follows
    lr · (m + (1 − m)·(1 + cos πp)/2) with p = (s − w)/(steps − w) and m = min_lr_ratio, which ends exactly at m·lr.

    Example:
        >>> config = TrainConfig(steps=100, warmup_steps=10, lr=0.004, min_lr_ratio=0.25)
        >>> [learning_rate(step, config) for step in (5, 10, 100)]
        [0.002, 0.004, 0.001]
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / (config.steps - config.warmup)
    height = (1.0 + math.cos(math.pi * progress)) / 2.0
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * height)
