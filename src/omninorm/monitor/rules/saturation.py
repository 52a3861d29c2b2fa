"""saturation: most inputs of a DyT or Derf lie in the flat part of its curve, so little gradient passes.

Signal: share of |αx| > 2. Threshold: above 50 % [ours]. Persistence: 3 samples over 20 steps. It is a warning.
"""

from __future__ import annotations

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Threshold


class Saturation(Threshold):
    """Reports the norm."""

    name = "saturation"
    source = "the threshold of 50 % is omninorm's own; see docs/watching.md"
    signal = "saturation"
    warn = 0.5
    persistence = 3
    span = 20

    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        norm = history.facts.norms[index].name
        evidence = f"{100 * value:.0f} % of the inputs of {norm} lie in the flat part of its curve (|αx| > 2)."
        return evidence, "Use a smaller initial α, or a lower learning rate for α."
