"""held-out-rising: the held-out loss rises while the training loss falls: the model overfits.

Signals: the losses that were passed to `Watch.log_eval`, by name, and the mean of the 20 training losses before each.
Threshold: the newest evaluation is at least 2 % above the lowest one, and the training loss is not above its mean at
that one. [ours] Persistence: the newest 3 evaluations each rose, after the lowest one. It is a warning. Without
training losses, the rise alone counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from omninorm.monitor.history import Evaluation, History
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import finite, known
from omninorm.record.alarm import Alarm

RISE, RISES, NEWEST = 0.02, 3, 20


class _Point(NamedTuple):
    """A held-out loss, its step, and the training loss before it."""

    loss: float
    step: int
    training: float | None


class HeldOutRising(Rule):
    """Reports the held-out data by name."""

    name = "held-out-rising"
    source = "the threshold, 2 % over 3 evaluations, is omninorm's own; see docs/watching.md"

    def __init__(self) -> None:
        self._points: dict[str, list[_Point]] = {}

    def on_evaluation(self, history: History, evaluation: Evaluation) -> Iterable[Alarm]:
        loss = finite(evaluation.loss)
        if loss is None:
            return
        points = self._points.setdefault(evaluation.name, [])
        points.append(_Point(loss, evaluation.step, _training_loss(history, evaluation.step)))
        lowest = min(points)
        newest = points[-RISES - 1 :]
        rises = len(newest) > RISES and all(old.loss < new.loss for old, new in pairwise(newest))
        if not rises or lowest.step > newest[0].step or loss - lowest.loss < RISE * abs(lowest.loss):
            return
        now = points[-1].training
        if now is not None and lowest.training is not None and now > lowest.training:
            return
        yield self._explain(evaluation.name, lowest, points[-1])

    def _explain(self, name: str, lowest: _Point, now: _Point) -> Alarm:
        evidence = f"Overfitting: the held-out loss {name!r} rose from {lowest.loss:.4g} at step {lowest.step} to "
        evidence += f"{now.loss:.4g} at step {now.step}"
        if now.training is not None and lowest.training is not None:
            evidence += f", while the training loss fell from {lowest.training:.4g} to {now.training:.4g}."
        else:
            evidence += f" and in each of the last {RISES} evaluations."
        remedy = f"Use the checkpoint of step {lowest.step}, or train with more data, weight decay or dropout."
        return self.alarm(now.step, "warn", None, evidence, remedy)


def _training_loss(history: History, step: int) -> float | None:
    losses = known(finite(each.loss) for each in history.steps if step - NEWEST < each.step <= step)
    return sum(losses) / len(losses) if losses else None
