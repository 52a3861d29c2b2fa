"""adam-state: Adam's moments are lost in the middle of training.

Signal: parameters whose state is empty before a step although they had one earlier, or although the run is resumed.
Step counts on the device are not read, so the state of fused and capturable optimizers on a GPU is not checked.
Persistence [ours]: none; with another optimizer for the same parameters 3 times, because a later phase of training may
need a new one. It is a warning: some methods reset the state on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.checks.facts import Restart
from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.record.alarm import Alarm

OPTIMIZERS = 3


class AdamState(Rule):
    """Reports the whole run."""

    name = "adam-state"
    source = "exact: the state of the optimizers; the number of new optimizers is omninorm's own"
    explains = LOSS_ALARMS

    def __init__(self) -> None:
        self._new = 0

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        restart = None if step.checks is None else step.checks.setup.restart
        if restart is None:
            return
        self._new += restart.new
        if not restart.new or self._new >= OPTIMIZERS:
            yield self.alarm(step.step, "warn", None, *self._explain(restart, step.step))

    def _explain(self, restart: Restart, step: int) -> tuple[str, str]:
        if restart.count is None:
            return (
                f"Adam's state was not restored: the run is resumed, but its moments begin at 0 in step {step}.",
                "Save optimizer.state_dict() with the model, and load it before training goes on. Without it, use a "
                "warm-up.",
            )
        if restart.new:
            return (
                f"Adam's state was lost {self._new} times: step {step} was made by a new optimizer, whose moments "
                "begin at 0.",
                "Create the optimizer once, before the loop, and pass it to watch.",
            )
        return (
            f"Adam's state was lost: in step {step} its moments begin at 0 after {restart.count} "
            f"step{'s' if restart.count > 1 else ''}.",
            "Look for code that clears optimizer.state or replaces parameters. If it was reset on purpose, warm up.",
        )
