"""eps-share: a norm's ε, not its input, sets the scale of its output.

Signal: ε/(mean(x²) + ε). Threshold: above 5 % is a warning, above 50 % a "fail": the norm barely normalizes. [ours]
1 % would be more cautious, but ordinary initializations exceed it: embeddings of std 0.02 with ε = 1e-5 begin at 2.4 %
and train well. Persistence: 3 samples over 20 steps; above 90 %, 2 samples over 4 steps are a "fail".
"""

from __future__ import annotations

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Threshold


class EpsShare(Threshold):
    """Reports the norm and its ε."""

    name = "eps-share"
    source = "the thresholds of 5, 50 and 90 % are omninorm's own; see docs/watching.md"
    explains = ("depth-growth", "branch-silent", "adam-underestimation")
    most_layers = 1  # ε is usually one setting for all norms, so one alarm about the worst is enough
    signal = "eps_share"
    warn = 0.05
    fail = 0.5
    extreme = 0.9
    persistence = 3
    span = 20

    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        norm = history.facts.norms[index]
        eps = "ε" if norm.eps is None else f"ε = {norm.eps:g}"
        evidence = f"Norm's ε too large: in {norm.name}, {eps} makes up {100 * value:.3g} % of mean(x²) + ε"
        evidence += ", so the norm scales its input by a constant instead of normalizing it." if value > 0.5 else "."
        size = 0.0 if norm.eps is None or value <= 0.0 else norm.eps * (1.0 / value - 1.0)
        if size <= 0.0:
            return evidence, "Find out why the norm's input is so small. For inputs of this size, use ε = 1e-6 or less."
        return evidence, f"Use a smaller ε, such as {min(1e-6, 1e-3 * size):.0e}: mean(x²) of its input is {size:.2g}."
