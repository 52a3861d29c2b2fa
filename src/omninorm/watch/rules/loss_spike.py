"""loss-spike: one step's loss is far above the last 128.

Signal: the loss. Threshold: more than 6σ and more than 20 % above the mean. Persistence: none, it is a warning.
Source: 6σ over 128 steps is OLMo-core's. Alone it fires 15 times in the 19,560 steps of a healthy GPT-2 124M, on
single batches whose text was harder, by at most 10 % of the loss; hence the 20 % [ours], with which it fires there 0
times.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, Step
from omninorm.watch.rules.base import Rule
from omninorm.watch.rules.numbers import finite
from omninorm.watch.rules.rolling import Rolling

SIGMAS = 6.0
RISE = 0.2
ORDINARY = 3.0  # σ; a gradient norm below mean + 3σ is an ordinary one


class LossSpike(Rule):
    """The evidence tells whether the updates before it were ordinary: then the batch is to blame."""

    name = "loss-spike"
    source = "6σ over 128 steps: OLMo-core; at least 20 %: calibrated on a healthy GPT-2 124M"

    def __init__(self) -> None:
        self._losses = Rolling()
        self._gradients = Rolling()
        self._unusual: int | None = None  # the last step whose gradient norm was not ordinary
        self._before: float | None = None

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss = finite(step.loss)
        if loss is not None:
            expected = self._losses.expected()
            self._losses.add(loss, expected)
            if expected is not None and loss > expected[0] + max(SIGMAS * expected[1], RISE * abs(expected[0])):
                yield self._explain(step.step, loss, expected)
            self._before = loss
        self._look_at_gradient(step)

    def _look_at_gradient(self, step: Step) -> None:
        norm = finite(step.grad_norm)
        if norm is None:
            return
        expected = self._gradients.expected()
        self._gradients.add(norm, expected)
        if expected is not None and norm > expected[0] + ORDINARY * expected[1]:
            self._unusual = step.step

    def _explain(self, step: int, loss: float, expected: tuple[float, float]) -> Alarm:
        mean, sigma = expected
        height = f"{(loss - mean) / sigma:.1f}σ" if sigma > 0.0 else f"{100 * (loss / mean - 1):.0f} %"
        evidence = f"The loss is {loss:.4g}, {height} above its mean over the last 128 steps, {mean:.4g}."
        at_once = self._before is not None and self._before <= mean + ORDINARY * sigma
        recent = self._unusual is not None and step - self._unusual <= 4
        if at_once and not recent:
            evidence += f" It rose from {self._before:.4g} within one step, after updates with ordinary gradients."
            remedy = f"Look at the batch of step {step}: the data changed, not the model."
        else:
            cause = f"the gradient norm was unusual at step {self._unusual}" if recent else "it rose over several steps"
            evidence += f" The model moved first: {cause}."
            remedy = "Clip gradients at 1.0, lower the learning rate, or lower Adam's β₂ to 0.95."
        return self.alarm(step, "warn", None, evidence, remedy)
