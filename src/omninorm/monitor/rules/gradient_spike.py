"""gradient-spike: gradient norms far above the last 128 recur, or were followed by a higher loss.

Signal: the total gradient norm before clipping. Threshold: more than 6σ above the mean and more than 3 times the
mean. Persistence: 64 steps of history, then either four such steps within 64 steps, or a loss more than 3σ above its
own mean within the 5 steps after the spike. It is a warning.
Source: 6σ over 128 steps is OLMo-core's limit. Alone it fires at 57 of the 19,560 steps of a healthy GPT-2 124M, mostly
at 1.3 to 2.5 times the mean, which clipping handles. With the factor of 3 [ours] it fires at 4 of them, and with the
recurrence or harm [ours] once. SGD without clipping has up to three such steps within 64 in runs that learn: of 24
small runs with momentum 0.9 and learning rate 0.1, 8 had one or more, and the loss rose after one of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import factor, finite
from omninorm.monitor.rules.rolling import Rolling
from omninorm.record.alarm import Alarm

SIGMAS = 6.0
FACTOR = 3.0
HISTORY, AGAIN, AFTER = 64, 64, 5
FEWEST = 4  # spikes within AGAIN steps that are reported although the loss has not risen
HARM = 3.0  # σ of the loss


class _Spike(NamedTuple):
    """A step's gradient norm, the mean it was compared with, and the loss expected then (mean and σ)."""

    step: int
    norm: float
    mean: float
    before: int
    loss: tuple[float, float] | None

    def words(self) -> str:
        return (
            f"at step {self.step} the gradient norm was {self.norm:.3g}, {factor(self.norm / self.mean)} times "
            f"its mean over the last {self.before} steps ({self.mean:.3g})"
        )


def _limit(expected: tuple[float, float]) -> float:
    mean, sigma = expected
    return max(mean + SIGMAS * sigma, FACTOR * mean)


class GradientSpike(Rule):
    """Reports the whole run. A single harmless spike raises no alarm."""

    name = "gradient-spike"
    source = "6σ over 128 steps is OLMo-core's limit; 3-fold and recurrence are omninorm's own; see docs/watching.md"
    symptom = True

    def __init__(self) -> None:
        self._norms, self._losses = Rolling(), Rolling()
        self._spikes: deque[_Spike] = deque(maxlen=FEWEST)
        self._passes = 1

    def bounds(self) -> dict[str, tuple[float | None, float | None]]:
        expected = self._norms.expected()
        if expected is None or self._norms.before < HISTORY:
            return {}
        return {"grad_norm": (None, _limit(expected))}

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        self._passes = history.passes
        last, spike = self._spikes[-1] if self._spikes else None, self._look(step)
        harm = self._harm(step, last)
        if spike:
            self._spikes.append(spike)
        if spike and len(self._spikes) == FEWEST and spike.step - self._spikes[0].step <= AGAIN:
            others = ", ".join(str(other.step) for other in list(self._spikes)[:-1])
            yield self._explain(step, "Gradient spikes recur", f"{spike.words()}, as before at steps {others}.")
        elif harm and last:
            yield self._explain(step, "Harmful gradient spike", f"{last.words()}, and then {harm}.")

    def _look(self, step: Step) -> _Spike | None:
        norm = finite(step.grad_norm)
        if norm is None:
            return None
        expected = self._norms.expected()
        self._norms.add(norm, expected)
        if expected is None or self._norms.before < HISTORY:
            return None
        mean, _ = expected
        if mean <= 0.0 or norm <= _limit(expected):
            return None
        return _Spike(step.step, norm, mean, self._norms.before, self._losses.expected())

    def _harm(self, step: Step, last: _Spike | None) -> str | None:
        """Describe the rise of the loss in the steps after the last spike; None if it did not rise."""
        loss = finite(step.loss)
        if loss is None:
            return None
        self._losses.add(loss, self._losses.expected())
        if last is None or last.loss is None or not 0 < step.step - last.step <= AFTER:
            return None
        mean, sigma = last.loss
        return f"the loss rose from {mean:.4g} to {loss:.4g}" if loss > mean + HARM * sigma else None

    def _explain(self, step: Step, cause: str, evidence: str) -> Alarm:
        remedy = (
            "Make sure that gradients are clipped, for example at norm 1. If spikes repeat, lower the learning rate, "
            "or log which examples each step uses and look at those of these steps."
        )
        if self._passes > 1:
            remedy += f" Make sure that the loss is divided by the {self._passes} accumulation steps."
        return self.alarm(step.step, "warn", None, f"{cause}: {evidence}", remedy)
