"""gradient-underflow: many elements of the gradients are exactly 0 because they are too small for their dtype.

Signal: the share of zeros among 32 × 32 elements of up to 8 matrices in the blocks, without rows and columns that are
0 as a whole: those belong to dead units. Threshold: 10 % in at least half of the matrices, while any gradient of the
model is not 0; a matrix whose gradient is 0 as a whole counts. The share is 0 in all healthy runs of our tests, because
each element is a sum over tokens. [ours] It is a warning: the elements that are left still train. Persistence: 3
samples over 20 steps.
Source: Micikevicius et al. describe how gradients underflow in fp16, and loss scaling as the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, values_of
from omninorm.record.alarm import Alarm

ZEROS, MATRICES = 0.1, 0.5
FEWEST = 2
SAMPLES, STEPS = 3, 20


class GradientUnderflow(Rule):
    """Reports the whole run."""

    name = "gradient-underflow"
    source = "Micikevicius et al., arXiv 1710.03740, section 3.2; the limit of 10 % is omninorm's own"
    explains = ("no-gradient", "adam-eps", "no-progress", "updates-lost")

    def __init__(self) -> None:
        self._streaks = Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        grids = sample.checks.grids
        sparse = [grid for grid in grids if grid.zeros >= ZEROS]
        alive = any(grid.zeros < 1.0 for grid in grids) or any(values_of(sample, "grad_norm"))
        holds = alive and len(sparse) >= max(FEWEST, MATRICES * len(grids))
        if not self._streaks.lasts("", holds, sample.step, SAMPLES, STEPS):
            return
        worst = max((grid for grid in sparse if grid.zeros < 1.0), key=lambda grid: grid.zeros, default=sparse[0])
        evidence = (
            f"Gradients underflow: in {len(sparse)} of {len(grids)} matrices, {100 * ZEROS:.0f} % of the elements or "
            f"more are exactly 0 at the optimizer's step ({100 * worst.zeros:.3g} % in {worst.name}), not counting "
            "dead rows and columns."
        )
        remedy = "Use bf16 instead of fp16, or a GradScaler, "
        if sample.checks.scale is not None:
            remedy = f"Use bf16 instead of fp16, or a larger scale than the GradScaler's {sample.checks.scale:g}, "
        remedy += (
            "and look for code that rounds or compresses gradients. Compare one of these gradients with that of the "
            "same batch in float32: if it has as many zeros there, they come from the model."
        )
        yield self.alarm(sample.step, "warn", None, evidence, remedy)
