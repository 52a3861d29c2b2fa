"""gradient-spike: one step's gradient norm is far above the last 128.

Signal: the total gradient norm before clipping. Threshold: more than 6σ above the mean and more than 3 times the
mean.
Persistence: none, it is a warning. Source: 6σ over 128 steps is OLMo-core's. Alone it fires at 57 of the 19,560 steps
of a healthy GPT-2 124M, mostly at 1.3 to 2.5 times the mean, which clipping takes care of; hence the factor [ours],
with which it fires there 4 times.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, Step
from omninorm.watch.rules.base import Rule
from omninorm.watch.rules.numbers import finite, fold
from omninorm.watch.rules.rolling import Rolling

SIGMAS = 6.0
FACTOR = 3.0


class GradientSpike(Rule):
    """A warning; whether it did harm is for the loss to say."""

    name = "gradient-spike"
    source = "6σ over 128 steps: OLMo-core; 3-fold: calibrated on a healthy GPT-2 124M"

    def __init__(self) -> None:
        self._norms = Rolling()

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        norm = finite(step.grad_norm)
        if norm is None:
            return
        expected = self._norms.expected()
        self._norms.add(norm, expected)
        if expected is None:
            return
        mean, sigma = expected
        if mean > 0.0 and norm > max(mean + SIGMAS * sigma, FACTOR * mean):
            evidence = (
                f"The gradient norm is {norm:.3g}, {fold(norm / mean)} its mean over the last 128 steps, {mean:.3g}."
            )
            remedy = f"Clip gradients near {2 * mean:.2g}, and look at the batch of step {step.step} if it recurs."
            yield self.alarm(step.step, "warn", None, evidence, remedy)
