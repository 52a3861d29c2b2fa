"""depth-growth: the residual stream or its gradient grows or shrinks exponentially over depth.

Signals: RMS of each block's output, and of the gradient there. Threshold: the exponent (1/L)·|ln(v_L/v_1)| of 0.05 is
a warning if the ends are 100-fold apart, 0.2 a "fail" if they are 10,000-fold apart; and v² over depth follows an
exponential more closely than a line. [ours] The stream of a healthy pre-norm model grows, too, but its variance does
so about linearly; trained GPT-2 grows with an exponent of 0.044. Persistence: 3 samples over 20 steps.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, Sample
from omninorm.watch.rules.base import Rule
from omninorm.watch.rules.depth import Growth, backward_growth, growth
from omninorm.watch.rules.numbers import Streaks

WARN, FAIL = 0.05, 0.2
WARN_TOTAL, FAIL_TOTAL = 100.0, 1e4
SAMPLES, STEPS = 3, 20
_PLACES = {"pre": "pre-norm", "post": "post-norm", "both": "norms before and after its branches", "none": "no norms"}


class DepthGrowth(Rule):
    """About the whole run: no single layer is to blame."""

    name = "depth-growth"
    source = "the thresholds of the exponent, 0.05 and 0.2, are omninorm's own; see docs/watching.md"
    explains = ("adam-eps", "massive-activation")

    def __init__(self) -> None:
        self._streaks = Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        for what, found in (
            ("the residual stream", growth(sample, "stream_rms")),
            ("the gradient of the residual stream", backward_growth(sample)),
        ):
            if found is None:
                continue
            warns = found.exponential and found.exponent > WARN and found.total > WARN_TOTAL
            fails = warns and found.exponent > FAIL and found.total > FAIL_TOTAL
            warned = self._streaks.lasts((what, "warn"), warns, sample.step, SAMPLES, STEPS)
            failed = self._streaks.lasts((what, "fail"), fails, sample.step, SAMPLES, STEPS)
            if warned:
                yield self._explain(history, sample, what, found, "fail" if failed else "warn")

    def _explain(self, history: History, sample: Sample, what: str, found: Growth, severity: str) -> Alarm:
        words = found.words(what)
        evidence = f"Exponential over depth: {words} (exponent {found.exponent:.2g})."
        place = _PLACES.get(history.placement or "")
        if place:
            evidence += f" The model has {place}."
        if what == "the residual stream":
            remedy = "divide the initial weights that write to the stream by √(2 · blocks)."
            other = "Lower the learning rate"
        else:
            remedy = "scaled residuals (DeepNorm), with a longer warm-up and a lower learning rate."
            other = "Use norms before and after the branches (sandwich)"
        remedy = f"{other if history.placement == 'pre' else 'Use pre-norm'}, or {remedy}"
        return self.alarm(sample.step, severity, None, evidence, remedy)
