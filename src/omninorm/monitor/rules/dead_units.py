"""dead-units: hidden units of a feed-forward are 0 for every token, so they get no gradient.

Signal: their share. Threshold: above 50 % [ours]. Up to 32 % occur in healthy runs with a ReLU (T5, PyTorch's encoder):
units that specialize are silent for all of a few hundred tokens. Persistence: 3 samples over 20 steps. It is a warning.
"""

from __future__ import annotations

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Threshold
from omninorm.monitor.rules.numbers import value_at


class DeadUnits(Threshold):
    """Reports the block of the feed-forward."""

    name = "dead-units"
    source = "the threshold of 50 % is omninorm's own; see docs/watching.md"
    signal = "dead_units"
    warn = 0.5
    persistence = 3
    span = 20

    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        block = history.facts.blocks[index]
        evidence = f"{100 * value:.0f} % of the hidden units in the feed-forward of {block} are 0 for every token."
        first = value_at(history.samples[0], self.signal, index)
        if first is not None and first > self.warn:
            evidence += f" It was {100 * first:.0f} % at step {history.samples[0].step}."
            return evidence, "Check the initialization of its weights and biases, and the norm before it."
        return (
            evidence,
            "Lower the learning rate or lengthen the warm-up. If the activation is a ReLU, try a smooth one.",
        )
