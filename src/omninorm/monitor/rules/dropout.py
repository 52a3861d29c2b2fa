"""dropout: a dropout layer removes most of its input.

Signal: the probability of each active nn.Dropout, and the largest of F.dropout in each block. Threshold: p > 0.6
[ours]; usual are 0 to 0.5, and p = 0.9 often means that the probability to keep a value was given. Persistence: none.
It is a warning: classifier heads have been trained with 0.7.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.record.alarm import Alarm

LARGEST = 0.6


class DropoutRule(Rule):
    """Reports the layer with the largest probability."""

    name = "dropout"
    source = "the largest probability is omninorm's own"

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        layers = () if step.checks is None else step.checks.setup.dropout
        high = [(probability, name) for name, probability in layers if probability > LARGEST]
        if not high:
            return
        probability, name = max(high, key=lambda item: item[0])
        others = f", and {len(high) - 1} other layers are above {LARGEST:g}" if len(high) > 1 else ""
        evidence = f"Dropout in {name} removes {100 * probability:.3g} % of its input: p = {probability:g}{others}."
        remedy = f"Lower p to 0.5 or less. It is the probability to remove a value; if {probability:g} of them should "
        remedy += f"stay, use p = {1 - probability:.2g}."
        yield self.alarm(step.step, "warn", name, evidence, remedy)
