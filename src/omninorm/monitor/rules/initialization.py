"""initialization: the first loss of an untrained classifier is far above that of equal probabilities.

Signals: the loss of step 1, and the mean of log Z. Threshold: the loss is 1.5 above ln(classes), and log Z is 1 above
it [ours]. With logits of standard deviation σ the first is about σ²/2 to σ²: healthy initializations start with σ < 1.
It is a warning, because many runs recover, at a cost. Only calls of F.cross_entropy are seen, and only weights that
look like a random initialization are judged: a pretrained model may be wrong about new data. Persistence: none, because
there is only one first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import finite, value_at, values_of
from omninorm.record.alarm import Alarm

LOSS, LOG_Z = 1.5, 1.0


class Initialization(Rule):
    """Reports the whole run, with the group of parameters that has the largest weights."""

    name = "initialization"
    source = "with equal probabilities the loss is ln(classes); the limit of 1.5 above it is omninorm's own"

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        classes, facts = history.classes, history.facts
        if sample.step != 1 or not facts.fresh or not classes or not history.steps:
            return
        loss, log_z = finite(history.steps[0].loss), value_at(sample, "logz_mean")
        equal = math.log(classes)
        if loss is None or log_z is None or loss - equal < LOSS or log_z - equal < LOG_Z:
            return
        evidence = (
            f"Initial weights too large: the first loss is {loss:.3g}, but equal probabilities for {classes} classes "
            f"would give {equal:.3g}, and the mean log Z is {log_z:.3g} instead of about that."
        )
        pairs = zip(values_of(sample, "weight_rms"), facts.groups, strict=False)
        largest = max(((value, name) for value, name in pairs if value is not None), default=None)
        if largest is not None:
            evidence += f" The largest weights are in {largest[1]} (RMS {largest[0]:.2g})."
        remedy = (
            "Initialize with a standard deviation of 0.02 or 1/√width, in particular an embedding that is also the "
            "output matrix (nn.Embedding begins with 1), and do not multiply the logits."
        )
        yield self.alarm(sample.step, "warn", None, evidence, remedy)
