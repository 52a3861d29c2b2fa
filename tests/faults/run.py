"""One run: an architecture, a seed, and a fault or none, as a line of the results."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from faults.architectures import ARCHITECTURES
from faults.baselines import first_nan, first_outlier
from faults.faults import load_faults
from faults.training import EVERY, STEPS, VARIANTS, Training, snapshot
from torch import Tensor

from omninorm import watch
from omninorm.record.alarm import Alarm, link

TAIL = 20
"""The number of last steps whose mean loss is compared."""
LOSS_EFFECT, WEIGHTS_EFFECT, PART_EFFECT = 0.01, 0.1, 0.5
"""Differences from the healthy twin that count as an effect: see `effect_of`. They are larger than the differences
between healthy runs whose initial weights differ by 1e-6: at most 0.0003, 0.03 and 0.29 in eight architectures."""
WINDOW = 10
EVIDENCE = 80
Line = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """The key of a run."""

    architecture: str
    seed: int
    variant: str = "plain"
    fault: str | None = None

    @property
    def key(self) -> str:
        """The key as one string."""
        return "/".join((self.architecture, self.variant, str(self.seed), self.fault or "healthy"))

    @property
    def twin(self) -> Case:
        """The same run without its fault."""
        return Case(self.architecture, self.seed, self.variant)


@dataclass
class Outcome:
    """The result of a run, with its weights."""

    line: Line
    training: Training
    weights: dict[str, Tensor]


def run(case: Case, steps: int = STEPS) -> Line:
    """Train, watch, and compare with the healthy twin."""
    outcome = train(case, steps)
    if case.fault is not None:
        twin = healthy(case.twin)
        outcome.line["twin_last"] = twin.line["last"]
        outcome.line["effect"] = effect_of(outcome, twin)
        outcome.line["has_effect"] = has_effect(outcome.line["effect"])
    return outcome.line


@functools.lru_cache(maxsize=2)
def healthy(case: Case) -> Outcome:
    """Return a healthy run. It is kept, because several faults share it."""
    return train(case)


def prepare(case: Case) -> Training:
    """Return the training with its fault injected and its optimizers built."""
    training = Training(ARCHITECTURES[case.architecture], case.seed, VARIANTS[case.variant])
    if case.fault is not None:
        fault = load_faults()[case.fault]
        training.begins = fault.begins(case.seed)
        fault.inject(training)
    training.build_optimizers()
    return training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, logs and prints: results are in the line."""
    logger = logging.getLogger("omninorm.watch")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


def train(case: Case, steps: int = STEPS) -> Outcome:
    """Train under watch, the first steps only if there are fewer than in a whole run."""
    start, error, alarms = time.process_time(), None, []
    with quiet():
        training = prepare(case)
        optimizers, settings = training.optimizers, training.settings
        watched = watch(training.model, optimizers, every=EVERY, scaler=training.scaler, config=settings)
        try:
            with watched:
                training.run(watched, steps)
        except Exception as raised:  # an error that ends the training is a result, too
            error = f"{type(raised).__name__}: {raised}"[:200]
        alarms = [as_row(alarm) for alarm in link(watched.alarms)]
    line = {**describe(case, training), "alarms": alarms, "seconds": round(time.process_time() - start, 2)}
    if error:
        line["error"] = error
    return Outcome(line, training, snapshot(training.model))


def as_row(alarm: Alarm) -> list[Any]:
    """Return an alarm as a list: step, severity, rule, layer, evidence, and those three of its cause if there is one."""
    cause = [] if alarm.cause is None else [[alarm.cause.step, alarm.cause.rule, alarm.cause.layer]]
    return [alarm.step, alarm.severity, alarm.rule, alarm.layer, alarm.evidence[:EVIDENCE], *cause]


def describe(case: Case, training: Training) -> Line:
    """Return the case, its fault's place, and its losses."""
    losses = training.losses
    return {
        "key": case.key,
        "architecture": case.architecture,
        "split": ARCHITECTURES[case.architecture].split,
        "variant": case.variant,
        "seed": case.seed,
        "fault": case.fault,
        "begins": training.begins,
        "layers": list(training.layers),
        "first": rounded(losses[0]) if losses else None,
        "last": rounded(tail(losses)) if losses else None,
        "nan": first_nan(losses),
        "outlier": first_outlier(losses),
    }


def tail(losses: list[float]) -> float:
    """Return the mean of the last losses."""
    return sum(losses[-TAIL:]) / len(losses[-TAIL:])


def rounded(number: float) -> float | None:
    """Return a number with four digits; None if it is not finite, because JSON has no NaN."""
    return float(f"{number:.4g}") if math.isfinite(number) else None


# Effects --------------------------------------------------------------------------------------------------------------


def effect_of(faulty: Outcome, twin: Outcome) -> dict[str, float | None]:
    """Compare a run with its healthy twin, which has the same seed and the same batches.

    Returns:
        loss: the largest difference of the mean loss over ten steps, relative to the twin's; None if it is not finite.
        evaluation: the same for the losses on other text.
        weights: the distance of the final weights, relative to the distance that the twin's have moved.
        part: the largest relative difference between the distances that a tensor has moved in both runs; 1 if it has
            not moved although the twin's has. Only lengths are compared, because a tensor whose gradient is nothing but
            rounding errors, such as a key's bias, moves in another direction whenever anything changes.
    """
    steps = len(twin.training.losses)
    loss = None
    if len(faulty.training.losses) == steps and all(map(math.isfinite, faulty.training.losses)):
        loss = _largest_gap(faulty.training.losses, twin.training.losses, WINDOW)
    evaluation = None
    if all(map(math.isfinite, faulty.training.evaluations)):
        evaluation = _largest_gap(faulty.training.evaluations, twin.training.evaluations, 1)
    total, part = _distances(faulty.weights, twin.weights, twin.training.initial)
    return {
        name: None if value is None else rounded(value)
        for name, value in (("loss", loss), ("evaluation", evaluation), ("weights", total), ("part", part))
    }


def has_effect(effect: dict[str, float | None]) -> bool:
    """Return whether a run differs measurably from its twin; None means a value that is not finite."""
    limits = {"loss": LOSS_EFFECT, "evaluation": LOSS_EFFECT, "weights": WEIGHTS_EFFECT, "part": PART_EFFECT}
    return any(value is None or value > limits[name] for name, value in effect.items())


def _largest_gap(faulty: list[float], twin: list[float], window: int) -> float:
    gaps = [0.0]
    for at in range(0, min(len(faulty), len(twin)) - window + 1, window):
        expected = sum(twin[at : at + window])
        gaps.append(abs(sum(faulty[at : at + window]) - expected) / max(abs(expected), 1e-6))
    return max(gaps)


def _distances(faulty: dict[str, Tensor], twin: dict[str, Tensor], initial: dict[str, Tensor]) -> tuple[float, float]:
    """Return the relative distance of all weights, and the largest difference in how far a tensor has moved."""
    apart, moved, worst = 0.0, 0.0, 0.0
    for name, expected in twin.items():
        if name in faulty and faulty[name].shape == expected.shape:
            distance = float((faulty[name] - expected).norm())
            travelled = float((expected - initial[name]).norm())
            apart, moved = apart + distance**2, moved + travelled**2
            if travelled > 1e-4 * float(expected.norm()):
                worst = max(worst, abs(float((faulty[name] - initial[name]).norm()) / travelled - 1.0))
    return math.sqrt(apart / moved) if moved else 0.0, worst
