"""input-scale: the model's floating-point inputs became much larger or smaller from one step to the next.

Signal: the RMS of the inputs in each step. Threshold: 10 times the median of up to 32 steps before, or a tenth of it,
is a warning; 50 times is a "fail" [ours]: images in 0 to 255 are 100 to 255 times larger than normalized ones.
Persistence: 2 steps, because a single batch may be an outlier. Models that read tokens have no such inputs.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.jumps import Jumps
from omninorm.record.alarm import Alarm

WARN, FAIL = 10.0, 50.0


class InputScale(Rule):
    """Reports the whole run: the inputs come from outside the model."""

    name = "input-scale"
    source = "the limits, 10-fold and 50-fold, are omninorm's own"
    explains = (
        *("embedding-scale", "layer-jump", "massive-activation", "attention-logits", "attention-entropy"),
        *("branch-silent", "loss-spike", "loss-rising", "unrecovered-spike", "gradient-spike", "odd-block"),
    )

    def __init__(self) -> None:
        self._jumps = Jumps(WARN, 2)

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        value = None if step.checks is None else step.checks.input
        found = None if value is None else self._jumps.see("", value, step.step)
        if found is None or value is None:
            return
        evidence = f"Inputs on another scale since step {found.since}: {found.words('the RMS of the inputs')}."
        remedy = (
            "Look at what prepares the inputs: a missing or repeated normalization, bytes (0 to 255) instead of unit "
            "scale, or another source of data."
        )
        yield self.alarm(step.step, "fail" if found.fold >= FAIL else "warn", None, evidence, remedy)
