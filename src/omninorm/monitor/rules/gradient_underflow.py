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
        is_half = sample.checks.scale is not None or works_in_16_bits(history)
        what = "Gradients underflow" if is_half else "Gradients have holes"
        evidence = (
            f"{what}: in {len(sparse)} of {len(grids)} matrices, {100 * ZEROS:.0f} % of the elements or "
            f"more are exactly 0 at the optimizer's step ({100 * worst.zeros:.3g} % in {worst.name}), not counting "
            "dead rows and columns."
        )
        yield self.alarm(sample.step, "warn", None, evidence, _remedy(sample.checks.scale, is_half))


def works_in_16_bits(history: History) -> bool:
    """Return whether the residual stream has 16 bits, or autocast was active in the newest step."""
    checks = history.steps[-1].checks if history.steps else None
    return history.dtype in ("float16", "bfloat16") or bool(checks and checks.setup.autocast)


def _remedy(scale: float | None, is_half: bool) -> str:
    if not is_half:
        return (
            "In float32 gradients hardly underflow. Look for code that rounds, masks or compresses them. Compare one "
            "of these gradients with that of the same batch without such code: if it has as many zeros there, they "
            "come from the model (a ReLU with few tokens, masked weights) and do no harm."
        )
    remedy = "Use bf16 instead of fp16, or a GradScaler, "
    if scale is not None:
        remedy = f"Use bf16 instead of fp16, or a larger scale than the GradScaler's {scale:g}, "
    return remedy + (
        "and look for code that rounds or compresses gradients. Compare one of these gradients with that of the "
        "same batch in float32: if it has as many zeros there, they come from the model."
    )
