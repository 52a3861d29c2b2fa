"""no-norm: the blocks have no norm, and the residual stream or its gradient explodes or vanishes over depth.

Signals: the RMS of the stream and of its gradient over depth; the first non-finite value of the forward pass.
Threshold: an exponent above 0.2 with ends that differ 100-fold, or a non-finite value, is a "fail"; an exponent above
0.2 with ends that differ 8-fold is a warning. [ours] Models designed to train without norms (ReZero, Fixup) keep both
flat and raise no alarm. Persistence: none, because it is a property of the initialization.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.monitor.rules.depth import backward_growth, growth, has_no_norm
from omninorm.record.alarm import Alarm

EXPONENT = 0.2
WARN_TOTAL, FAIL_TOTAL = 8.0, 100.0


class NoNorm(Rule):
    """Reports the missing norms as the cause of the other rules' alarms."""

    name = "no-norm"
    source = "the thresholds, an exponent of 0.2 and 100-fold, are omninorm's own; see docs/watching.md"
    explains = (*LOSS_ALARMS, "depth-growth", "no-progress", "massive-activation", "adam-eps", "logz", "nonfinite")

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        found = history.nonfinite
        if found is not None and found.step <= step.step and found.phase == "forward" and has_no_norm(history):
            evidence = f"No norm in {len(history.facts.blocks)} blocks: at step {found.step} "
            evidence += f"the residual stream exceeded the range of its dtype in {found.layer}."
            yield self._explain(found.step, "fail", evidence)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        if not has_no_norm(history):
            return
        stream, gradient = growth(sample, "stream_rms", history.facts), backward_growth(sample, history.facts)
        named = {"the residual stream": stream, "the gradient": gradient}
        wild = {what: found for what, found in named.items() if found is not None and found.exponent > EXPONENT}
        largest = max((found.total for found in wild.values()), default=1.0)
        if largest > WARN_TOTAL:
            words = ", and ".join(found.words(what) for what, found in wild.items() if found.total > WARN_TOTAL)
            severity = "fail" if largest > FAIL_TOTAL else "warn"
            yield self._explain(sample.step, severity, f"No norm in {len(history.facts.blocks)} blocks: {words}.")

    def _explain(self, step: int, severity: str, evidence: str) -> Alarm:
        remedy = "Use pre-norm: one norm before each attention and feed-forward, and one after the last block. "
        remedy += "Without norms, initialize each branch to 0 (ReZero) or scale it by depth (Fixup)."
        return self.alarm(step, severity, None, evidence, remedy)
