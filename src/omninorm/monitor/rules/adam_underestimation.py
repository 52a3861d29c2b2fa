"""adam-underestimation: the gradients have outgrown Adam's second moment, so its updates are too large.

Signal: √mean(g² / max(v, ε²)) of each parameter group's worst tensor; 1 where v is up to date. Threshold: above 2.3,
after which the loss often spiked (StableAdamW). Persistence: 5 samples over 50 steps [ours]. It is a warning.
"""

from __future__ import annotations

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Threshold


class AdamUnderestimation(Threshold):
    """Reports the tensor."""

    name = "adam-underestimation"
    source = "the threshold of 2.3 is from StableAdamW, arXiv 2304.13013; the persistence is omninorm's own"
    signal = "adam_ratio"
    warn = 2.3
    persistence = 5
    span = 50

    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        tensor = worst_tensor(history, sample, self.signal, index)
        evidence = f"The gradient of {tensor} is {value:.3g} times as large as Adam's second moment v predicts."
        return evidence, "Lower β₂ (0.95 instead of 0.999), clip gradients, or use StableAdamW's update clipping."


def worst_tensor(history: History, sample: Sample, signal: str, index: int) -> str:
    """Return the name of the group's worst tensor; the group's name where that is unknown."""
    names = sample.worst.get(signal, ())
    name = names[index] if index < len(names) else None
    return name or f"a tensor of {history.facts.groups[index]}"
