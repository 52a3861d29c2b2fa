"""adam-eps: Adam's ε is not small compared with the gradients, so updates are smaller than the learning rate suggests.

Signal: RMS(g)/ε of each parameter group's worst tensor. Threshold: below 10 is a warning. Below 1 in at least half of
the groups is a "fail": the run then trains at a different learning rate from the one that was set. Persistence: a
"fail" after 3 samples over 10 steps; a warning after 5 samples over 100 steps, because the gradients of queries and
keys are small until attention has learned a pattern: with initial weights of std 0.02 they went down to 5 × 1e-8 in
healthy runs. Gradients of exactly 0 are ignored (a zero-initialized neighbour, a frozen branch), and so are biases (a
key bias has a gradient of nothing but rounding errors in any model).
Source: Wortsman et al. found that ε = 1e-8 limits large models; the thresholds follow theirs in order of magnitude.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.adam_underestimation import worst_tensor
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, values_of
from omninorm.record.alarm import Alarm
from omninorm.record.signals import Limit

SIGNAL = "adam_eps_ratio"
WARN, FAIL = 10.0, 1.0
FAIL_SHARE = 0.5
CLIPPED = 1e-3  # gradients this far below ε suggest another cause as well
USUAL = 1e-8  # an ε of this size or less suits ordinary gradients
SAMPLES, STEPS = 3, 10
WARN_SAMPLES, WARN_STEPS = 5, 100


class AdamEps(Rule):
    """One alarm about the worst tensor, with the number of groups affected."""

    name = "adam-eps"
    explains = ("no-progress",)
    source = "gradients below Adam's ε: Wortsman et al., arXiv 2309.14322"

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._named: dict[bool, str] = {}  # the tensor named by the alarm, by severity, until nothing is wrong

    def limits(self) -> Sequence[Limit]:
        condition = f"a failure only in {100 * FAIL_SHARE:.0f} % of the groups"
        return (Limit(SIGNAL, self.name, WARN, FAIL, below=True, condition=condition),)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        if history.facts.adam_eps == 0.0:
            return
        ratios = [
            (value, index)
            for index, value in enumerate(values_of(sample, SIGNAL))
            if value and index < len(history.facts.groups) and not self._is_bias(history, sample, index)
        ]
        small = [ratio for ratio in ratios if ratio[0] < FAIL]
        fails = bool(ratios) and len(small) >= FAIL_SHARE * len(ratios)
        failed = self._streaks.lasts("fail", fails, sample.step, SAMPLES, STEPS)
        warns = bool(ratios) and min(ratios)[0] < WARN
        warned = self._streaks.lasts("warn", warns, sample.step, WARN_SAMPLES, WARN_STEPS)
        if failed or warned:
            yield self._explain(history, sample, ratios, failed)
        elif not warns:
            self._named.clear()

    @staticmethod
    def _is_bias(history: History, sample: Sample, index: int) -> bool:
        return worst_tensor(history, sample, SIGNAL, index).endswith("bias")

    def _explain(self, history: History, sample: Sample, ratios: list[tuple[float, int]], failed: bool) -> Alarm:
        value, index = min(ratios)
        tensor = worst_tensor(history, sample, SIGNAL, index)
        eps = history.facts.adam_eps
        size = "ε" if eps is None else f"ε (ε = {eps:g})"
        beyond = sum(ratio < WARN for ratio, _ in ratios)
        evidence = (
            f"Adam's ε too large: the RMS gradient of {tensor} is only {value:.2g} × {size}. "
            f"In {beyond} of {len(ratios)} parameter groups the smallest gradient is below {WARN:g} × ε."
        )
        target = "1e-15" if eps is None else f"{max(eps * value / 100, 1e-15):.0e}"
        remedy = f"Set ε to {target} or less. At present ε, not the learning rate, determines the size of the updates."
        if value < CLIPPED or (eps is not None and eps <= USUAL):
            remedy = (
                "Find out first why the gradients are so small: clipping, a loss that is scaled down, or gradients "
                f"that shrink on the way to the first blocks (stream_grad). If that is intended, set ε to {target}."
            )
        layer = self._named.setdefault(failed, tensor)  # which tensor is the worst changes from sample to sample
        return self.alarm(sample.step, "fail" if failed else "warn", layer, evidence, remedy)
