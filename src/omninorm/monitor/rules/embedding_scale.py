"""embedding-scale: what enters the blocks became much larger from one step to the next.

Signal: max |x| of each module outside the blocks that runs before the first block, such as an embedding, in every step.
Threshold: 20 times the median of up to 32 steps before it is a warning, 100 times a "fail" [ours]: an optimizer cannot
do this in one step, and in a batch with rare tokens it does not happen either, because the rows of a table begin alike.
Persistence: 2 steps.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.jumps import Jump, Jumps
from omninorm.record.alarm import Alarm

WARN, FAIL = 20.0, 100.0


class EmbeddingScale(Rule):
    """Reports the first of the modules."""

    name = "embedding-scale"
    source = "the limits, 20-fold and 100-fold, are omninorm's own"
    explains = (
        *("layer-jump", "massive-activation", "attention-logits", "attention-entropy", "branch-silent", "odd-block"),
        *("depth-growth", "loss-spike", "loss-rising", "unrecovered-spike", "gradient-spike", "adam-eps", "eps-share"),
    )

    def __init__(self) -> None:
        self._jumps = Jumps(WARN, 2)

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        found: tuple[str, Jump] | None = None
        for name, peak in step.checks.before_blocks if step.checks else ():
            jump = self._jumps.see(name, peak, step.step)
            if jump is not None and jump.value > jump.before and found is None:  # later modules inherit it
                found = name, jump
        if found is None:
            return
        layer, jump = found
        evidence = (
            f"The output of {layer} is on another scale since step {jump.since}: {jump.words('its largest element')}."
        )
        remedy = (
            f"Look at what changed in or right after {layer} at step {jump.since}: a factor such as √d_model that is "
            "applied twice, code that writes to its weights, or other inputs."
        )
        yield self.alarm(step.step, "fail" if jump.fold >= FAIL else "warn", layer, evidence, remedy)
