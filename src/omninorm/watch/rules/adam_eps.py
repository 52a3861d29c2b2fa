"""adam-eps: Adam's ε is not small against the gradients, so the steps are smaller than the learning rate says.

Signal: RMS(g)/ε of each parameter group's worst tensor. Threshold: below 10 is a warning; below 1 in at least half of
the groups a "fail": then the run trains at another rate than the one that was set. Persistence: a "fail" after 3
samples over 10 steps; a warning after 5 over 100, since the gradients of queries and keys are small until attention
has learned to look somewhere: with initial weights of 0.02 they passed through 5 times 1e-8 in healthy runs.
Gradients of exactly 0 don't count (a zero-initialized neighbour, a frozen branch), nor do biases (that of a key has
no gradient but rounding errors, whatever the model).
Source: Wortsman et al. saw ε = 1e-8 limit large models; the numbers are theirs by order of magnitude.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, Sample
from omninorm.watch.rules.adam_underestimation import worst_tensor
from omninorm.watch.rules.base import Rule
from omninorm.watch.rules.numbers import Streaks, values_of

SIGNAL = "adam_eps_ratio"
WARN, FAIL = 10.0, 1.0
FAIL_SHARE = 0.5
SAMPLES, STEPS = 3, 10
WARN_SAMPLES, WARN_STEPS = 5, 100


class AdamEps(Rule):
    """One alarm about the worst tensor, and for how many groups it holds."""

    name = "adam-eps"
    explains = ("no-progress",)
    source = "gradients below Adam's ε: Wortsman et al., arXiv 2309.14322"

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._named: dict[bool, str] = {}  # the tensor that is named, by severity, until all is clear

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
        size = "Adam's ε" if eps is None else f"Adam's ε, {eps:g}"
        beyond = sum(ratio < WARN for ratio, _ in ratios)
        evidence = (
            f"Adam's ε too large: the gradient of {tensor} is {value:.2g} times {size}; "
            f"in {beyond} of {len(ratios)} groups of parameters some gradient is less than {WARN:g} times it."
        )
        target = "1e-15" if eps is None else f"{max(eps * value / 100, 1e-15):.0e}"
        remedy = f"Set ε to {target} or less; as it is, ε and not the learning rate sets the size of the updates."
        layer = self._named.setdefault(failed, tensor)  # another tensor is the worst at every sample
        return self.alarm(sample.step, "fail" if failed else "warn", layer, evidence, remedy)
