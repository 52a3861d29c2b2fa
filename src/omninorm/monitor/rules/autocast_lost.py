"""autocast-lost: the model trains without autocast although its settings, a GradScaler, or earlier steps call for it.

Signal: whether autocast is active at the beginning of the model's forward or at the input of its first block.
Persistence [ours]: 3 steps in a row. It is a warning: training in float32 is correct, but slower. A residual stream of
16 bits shows that autocast, or a conversion, happens further inside. The settings are the `config` of `watch`, or those
of a trainer: "precision", "mixed_precision", "bf16" and "fp16". In a compiled model, or one without blocks, where
autocast may begin unseen, they are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.record.alarm import Alarm

STEPS = 3
HALF = ("float16", "bfloat16")


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
        if self._without < STEPS:
            return
        found = self._explain(history, step)
        if found:
            yield self.alarm(step.step, "warn", None, *found)

    def _explain(self, history: History, step: Step) -> tuple[str, str] | None:
        """Return the evidence and the remedy; None if nothing calls for autocast."""
        assert step.checks is not None
        setup, since = step.checks.setup, f"since step {step.step - self._without + 1}."
        remedy = "Run the model's forward and the loss inside `with torch.autocast(…)` in every step. If float32 is "
        remedy += "intended, "
        asked = history.facts.precision if setup.inside and history.facts.blocks else None
        if self._with >= STEPS:
            evidence = f"Autocast is no longer active: the model has run without it {since}"
            return evidence, remedy + ("leave out the GradScaler." if setup.scaled else "nothing is wrong.")
        if history.dtype in HALF:
            return None
        if asked and history.dtype:
            evidence = f"Autocast is not active although the settings ask for {asked}: the residual stream has been in "
            return evidence + f"{history.dtype} {since}", remedy + "correct the settings."
        if setup.scaled:
            evidence = f"Autocast is not active although there is a GradScaler: the model has run in float32 {since}"
            return evidence, remedy + "leave out the GradScaler."
        return None
