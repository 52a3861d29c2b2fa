"""depth-growth: the residual stream or its gradient grows or shrinks exponentially over depth.

Signals: RMS of each block's output, and of the gradient there. Threshold: an exponent (1/L)·|ln(v_L/v_1)| above 0.05
is a warning if the two ends differ 100-fold; above 0.2 it is a "fail" if they differ 10,000-fold. Both require that v²
over depth fits an exponential better than a line. [ours] The stream of a healthy pre-norm model also grows, but its
variance does so about linearly; trained GPT-2 has an exponent of 0.044. Persistence: 3 samples over 20 steps. In a
post-norm model, a gradient that shrinks on its way back warns after 80 steps: in 6 healthy runs with 8 blocks the ends
differed up to 1,250-fold for up to 70 steps, until more than the last blocks began to learn.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.depth import Growth, backward_growth, growth
from omninorm.monitor.rules.numbers import Streaks
from omninorm.record.alarm import Alarm

WARN, FAIL = 0.05, 0.2
WARN_TOTAL, FAIL_TOTAL = 100.0, 1e4
SAMPLES, STEPS, POST_STEPS = 3, 20, 80
_PLACES = {
    "pre": "The model uses pre-norm.",
    "post": "The model uses post-norm.",
    "both": "The model has norms before each branch and after each sum.",
    "sandwich": "The model has norms before and after each branch.",
    "reordered": "The model has norms after each branch.",
    "none": "The model has no norms.",
}


class DepthGrowth(Rule):
    """Reports the whole run, because no single layer is the cause."""

    name = "depth-growth"
    source = "the thresholds of the exponent, 0.05 and 0.2, are omninorm's own; see docs/watching.md"
    explains = ("adam-eps", "massive-activation")

    def __init__(self) -> None:
        self._streaks = Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        for what, found in (
            ("the residual stream", growth(sample, "stream_rms", history.facts)),
            ("the gradient of the residual stream", backward_growth(sample, history.facts)),
        ):
            if found is None:
                continue
            warns = found.exponential and found.exponent > WARN and found.total > WARN_TOTAL
            fails = warns and found.exponent > FAIL and found.total > FAIL_TOTAL
            steps = POST_STEPS if history.placement == "post" and found.backward and found.ratio < 1.0 else STEPS
            warned = self._streaks.lasts((what, "warn"), warns, sample.step, SAMPLES, steps)
            failed = self._streaks.lasts((what, "fail"), fails, sample.step, SAMPLES, STEPS)
            if warned or failed:
                yield self._explain(history, sample, what, found, "fail" if failed else "warn")

    def _explain(self, history: History, sample: Sample, what: str, found: Growth, severity: str) -> Alarm:
        words = found.words(what)
        evidence = f"Exponential over depth: {words} (exponent {found.exponent:.2g})."
        place = _PLACES.get(history.placement or "")
        if place:
            evidence += f" {place}"
        if what == "the residual stream":
            remedy = "divide the initial weights of layers that write to the residual stream by √(2 · blocks)."
            other = "Lower the learning rate"
        else:
            remedy = "scaled residuals (DeepNorm) with a longer warm-up and a lower learning rate."
            other = "Use norms before and after each branch (sandwich)"
            if history.placement == "sandwich":
                other = "Lower the learning rate"
        remedy = f"{other if history.placement in ('pre', 'sandwich') else 'Use pre-norm'}, or {remedy}"
        return self.alarm(sample.step, severity, None, evidence, remedy)
