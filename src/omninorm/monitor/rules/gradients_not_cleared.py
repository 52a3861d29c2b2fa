"""gradients-not-cleared: the gradients of earlier steps are still there when a step's first backward pass adds to them.

Signal: after an optimizer step, the gradient of a parameter is neither None nor another tensor nor written to, and
not 0, when the next backward pass begins; and the next optimizer step uses it. This is exact: accumulation over
several backward passes, `zero_grad(set_to_none=False)`, and parts that are trained alternately do not look like this.
Persistence: 2 consecutive optimizer steps [ours].
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.record.alarm import Alarm

STEPS = 2


class GradientsNotCleared(Rule):
    """Reports the whole run."""

    name = "gradients-not-cleared"
    source = "exact: the same tensor with the same version as after the previous step"
    explains = (
        *LOSS_ALARMS,
        "learning-rate",
        "no-progress",
        "adam-underestimation",
        "gradient-clipped",
        "attention-logits",
        "attention-entropy",
        "dead-units",
        "layer-jump",
        "weights-vanish",
        "logz",
        "nonfinite",
    )

    def __init__(self) -> None:
        self._count = 0

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        checks = step.checks
        # `step` may be called for each micro-batch: those before the optimizer's step count neither way.
        if checks is None or not (checks.stepped if checks.optimizer else checks.received):
            return
        self._count = 0 if checks.kept is None else self._count + 1
        if self._count >= STEPS:
            evidence = (
                f"Gradients are not cleared: in each of the last {self._count} steps the backward pass added to the "
                "gradients of the previous steps."
            )
            remedy = "Call optimizer.zero_grad() after optimizer.step(), or before the first backward pass of a step."
            yield self.alarm(step.step, "fail", None, evidence, remedy)
