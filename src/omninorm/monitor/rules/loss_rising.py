"""loss-rising: the training loss has risen for many steps, or rose and recovered.

Signal: the loss. Threshold: the mean of the newest 10 losses is above the lowest mean of 10 consecutive losses within
the last 500 steps by 8 % and by 6 standard errors of that difference. [ours] Single spikes are the subject of
loss-spike. Persistence: 25 steps, or 120 if less than three quarters of the highest rise are left, because it may be
recovering; or, if it has recovered (half of the highest rise or less is left), 15 steps. Losses of other data (a
curriculum) can rise as well, so it is a warning. A warm restart raises the loss on purpose: steps at more than 1.5
times the learning rate of the lowest mean do not count.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import finite
from omninorm.monitor.rules.rolling import Rolling
from omninorm.record.alarm import Alarm

NEWEST, WINDOW = 10, 500
RISE, ERRORS = 0.08, 6.0
LASTING, LONG, RECOVERED = 25, 120, 15
FALLING, HALF = 0.75, 0.5  # of the highest rise
RESTART = 1.5


class _Mean(NamedTuple):
    """The mean of 10 losses, the last of their steps, and the learning rate there."""

    value: float
    step: int
    rate: float | None


class LossRising(Rule):
    """Reports the whole run, with the steps between which the loss rose."""

    name = "loss-rising"
    source = "the thresholds, 8 % and 6 standard errors for 25 steps, are omninorm's own; see docs/watching.md"
    symptom = True

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=NEWEST)
        self._lowest: deque[_Mean] = deque()  # ascending: the lowest mean of the window first
        self._noise = Rolling()
        self._since: int | None = None  # the step at which the loss began to be high
        self._peak: _Mean | None = None
        self._armed = True  # False after a rise, until the loss is low again

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss = finite(step.loss)
        if loss is None:
            return
        self._noise.add(loss, self._noise.expected())
        self._losses.append(loss)
        if len(self._losses) < NEWEST:
            return
        mean = _Mean(sum(self._losses) / NEWEST, step.step, finite(step.lr))
        best = next((low for low in self._lowest if low.step <= step.step - NEWEST), None)
        if best is not None:
            yield from self._judge(best, mean)
        self._remember(mean)

    def _judge(self, best: _Mean, mean: _Mean) -> Iterable[Alarm]:
        expected = self._noise.expected()
        error = expected[1] * math.sqrt(2 / NEWEST) if expected else math.inf
        limit = max(RISE * abs(best.value), ERRORS * error)
        restarted = best.rate is not None and mean.rate is not None and mean.rate > RESTART * best.rate
        rise = mean.value - best.value
        self._armed = self._armed or rise < limit / 2
        if rise >= limit and not restarted and self._armed and self._since is None:
            self._since, self._peak = mean.step, mean
        if self._since is None:
            return
        self._peak = max(self._peak or mean, mean)
        left, steps = rise / (self._peak.value - best.value), mean.step - self._since
        if restarted or left <= HALF:
            peak, self._since, self._armed = self._peak, None, False
            if steps >= RECOVERED and not restarted:
                yield self._explain(best, mean, peak, recovered=True)
        elif steps >= (LASTING if left >= FALLING else LONG):
            yield self._explain(best, mean, self._peak, recovered=False)

    def _remember(self, mean: _Mean) -> None:
        while self._lowest and self._lowest[-1].value >= mean.value:
            self._lowest.pop()
        self._lowest.append(mean)
        while self._lowest[0].step <= mean.step - WINDOW:
            self._lowest.popleft()

    def _explain(self, best: _Mean, mean: _Mean, peak: _Mean, recovered: bool) -> Alarm:
        if recovered:
            evidence = (
                f"Loss rose and recovered: between steps {best.step} and {mean.step} its mean over {NEWEST} steps "
            )
            evidence += f"rose from {best.value:.4g} to {peak.value:.4g} and fell to {mean.value:.4g}."
            remedy = (
                f"Look at the data of steps {best.step} to {mean.step}: labels, order, and preprocessing. If a "
                f"checkpoint from before step {best.step} has an ordinary loss on it, an update was too large: "
                "lower the learning rate."
            )
        else:
            evidence = f"Loss rising: its mean over {NEWEST} steps rose from {best.value:.4g} at step {best.step} to "
            evidence += f"{mean.value:.4g}."
            remedy = f"Compare the data since step {best.step} with the data before it. If they are alike, lower the "
            remedy += "learning rate or weight decay, or resume from a checkpoint before that step."
        return self.alarm(mean.step, "warn", None, evidence, remedy)
