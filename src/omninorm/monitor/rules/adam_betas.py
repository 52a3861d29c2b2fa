"""adam-betas: Adam's β₁ and β₂ do not fit each other, or β₂ averages over very few steps.

Signal: the coefficients of each step. Thresholds: Adam is known to converge only with β₁ < √β₂ < 1 (Zhang et al. 2022,
arXiv 2208.09632; Reddi et al. 2018, arXiv 1904.09237). Below β₂ = 0.8 the second moment is a mean over fewer than 5
steps [ours]. Each alone is a warning. Swapped coefficients violate both conditions, which is a "fail": with β₁ = 0.999
and β₂ = 0.5 updates grow up to 1.4-fold in each step with a small gradient. Persistence: none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.record.alarm import Alarm

SMALLEST = 0.8


class AdamBetas(Rule):
    """Reports the whole run."""

    name = "adam-betas"
    explains = (
        *(
            "layer-jump",
            "embedding-scale",
            "odd-block",
            "learning-rate",
            "depth-growth",
            "attention-logits",
            "attention-entropy",
            "dead-units",
        ),
        *("loss-spike", "unrecovered-spike", "loss-rising", "gradient-spike", "no-progress"),
    )
    source = "β₁ < √β₂: Zhang et al. 2022, arXiv 2208.09632; the smallest β₂ is omninorm's own"

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        for first, second in () if step.checks is None else step.checks.setup.betas:
            unstable = first >= math.sqrt(second)
            if unstable or second < SMALLEST:
                reason = (
                    f"β₁ is not below √β₂ = {math.sqrt(second):.3g}, so Adam may not converge"
                    if unstable
                    else f"the second moment is a mean over about {1 / (1 - second):.2g} steps"
                )
                evidence = f"Adam's β₁ = {first:g} and β₂ = {second:g} are unusual: {reason}."
                remedy = "Use betas=(0.9, 0.999), or (0.9, 0.95) for language models; β₁ comes first."
                severity = "fail" if unstable and second < SMALLEST else "warn"
                yield self.alarm(step.step, severity, None, evidence, remedy)
                return
