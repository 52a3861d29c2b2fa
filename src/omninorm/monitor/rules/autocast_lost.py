"""autocast-lost: the model trains without autocast although a GradScaler, or its earlier steps, call for it.

Signal: whether autocast is active at the beginning of the model's forward or at the input of its first block.
Persistence [ours]: 3 steps in a row. It is a warning: training in float32 is correct, but slower. A residual stream of
16 bits shows that autocast, or a conversion, happens further inside.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.record.alarm import Alarm

STEPS = 3


class AutocastLost(Rule):
    """Reports the whole run."""

    name = "autocast-lost"
    source = "exact: the state of autocast; the number of steps is omninorm's own"

    def __init__(self) -> None:
        self._with = self._without = 0

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        if step.checks is None or step.checks.setup.autocast is None:
            return
        if step.checks.setup.autocast:
            self._with, self._without = self._with + 1, 0
            return
        self._without += 1
        if self._without < STEPS or (self._with < STEPS and not self._is_expected(history, step)):
            return
        since = step.step - self._without + 1
        if self._with >= STEPS:
            evidence = f"Autocast is no longer active: the model has run without it since step {since}."
        else:
            evidence = "Autocast is not active although there is a GradScaler: the model has run in float32 since "
            evidence += f"step {since}."
        remedy = "Run the model's forward and the loss inside `with torch.autocast(…)` in every step. If float32 is "
        remedy += "intended, leave out the GradScaler."
        yield self.alarm(step.step, "warn", None, evidence, remedy)

    @staticmethod
    def _is_expected(history: History, step: Step) -> bool:
        """Return whether a GradScaler calls for autocast and nothing shows that it happens further inside."""
        assert step.checks is not None
        return step.checks.setup.scaled and history.dtype not in ("float16", "bfloat16")
