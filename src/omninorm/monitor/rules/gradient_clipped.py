"""gradient-clipped: clipping shortens the gradient to less than a hundredth of its norm, all the time.

Signal: the norm of the gradient at the optimizer's step and after the backward pass. Threshold: below 1 % in every
sample, while the norm at the step stays the same up to 1 % [ours]. A gradient that is divided by a number of tokens
shrinks as well, but its norm varies like that of the gradient.
Persistence: 3 samples over 20 steps. It is a warning: Adam divides by the size of the gradient anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, factor, finite, known, median
from omninorm.record.alarm import Alarm

SHARE, SAME = 0.01, 0.01
SAMPLES, STEPS = 3, 20
EARLY, GROWN = 20, 10.0
"""A gradient this many times as large as in that many first steps is a fault of its own."""
SUMMED = 8.0
"""A first loss this many times that of equal probabilities may be a sum over tokens."""


class GradientClipped(Rule):
    """Reports the whole run."""

    name = "gradient-clipped"
    source = "the limit of 1 % of the norm is omninorm's own"

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._first = 0.0

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        before, after = sample.checks.norms or (0.0, 0.0)
        clipped = 0.0 < after < SHARE * before < float("inf")
        if clipped and abs(after - self._first) > SAME * self._first:
            self._streaks.end("clipped")
            self._first = after
        if self._streaks.lasts("clipped", clipped, sample.step, SAMPLES, STEPS):
            evidence = (
                f"Clipping leaves {100 * after / before:.2g} % of the gradient: its norm is {before:.3g} after the "
            )
            evidence += f"backward pass and {after:.3g} at the optimizer's step."
            yield self.alarm(sample.step, "warn", None, evidence, self._remedy(history, after, before))

    @staticmethod
    def _remedy(history: History, after: float, before: float) -> str:
        eps = history.facts.adam_eps
        first = known(finite(step.grad_norm) for step in list(history.steps)[:EARLY])
        if first and before > GROWN * median(first):
            return (
                f"Find out why the gradient is {factor(before / median(first))} times as large as it was until step "
                f"{history.steps[min(EARLY, len(history.steps)) - 1].step}. Raising max_norm would not help."
            )
        if (sum_of := _summed(history)) is not None:
            return (
                f"Check whether the loss is a sum over tokens: the first loss is {sum_of} times ln({history.classes}), "
                f"that of equal probabilities. If so, use the mean, such as reduction='mean', and keep max_norm. If "
                f"not, raise max_norm to about {_rounded(before)}, the usual norm."
            )
        if eps is None:
            return (
                f"Raise max_norm to about {_rounded(before)}, the usual norm. Without Adam's normalization the updates "
                f"are {factor(before / after)} times smaller than the learning rate suggests."
            )
        return (
            f"Raise max_norm to about {_rounded(before)}, the usual norm. Adam undoes a constant factor, so this does "
            f"little harm while the gradient's elements stay far above its ε of {eps:.0e}; but every batch counts the "
            "same."
        )


def _summed(history: History) -> str | None:
    """Return how many times the loss of equal probabilities the first loss is, if it may be a sum."""
    first = finite(history.steps[0].loss) if history.steps else None
    if first is None or not history.classes or history.classes < 2:
        return None
    times = first / math.log(history.classes)
    return factor(times) if times >= SUMMED else None


def _rounded(norm: float) -> str:
    """Return a norm of one digit without an exponent, such as "600"."""
    return f"{float(f'{norm:.1g}'):,g}"
