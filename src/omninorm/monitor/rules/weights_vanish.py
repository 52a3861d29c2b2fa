"""weights-vanish: weight decay shrinks the weights faster than the gradient can rebuild them.

Signals: RMS(w) and RMS(Δw)/RMS(w) of a step, by group of parameters. Threshold: within 50 steps the weights of six of
ten groups fell at least 3-fold, while the median update is 5 % of the weights or more. [ours] In training, weights
grow or stay about the same; AdamW's usual decay, lr × weight_decay, removes 1e-5 to 1e-3 of them per step.
Persistence: 3 consecutive samples are a "fail"; before that it is a warning.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.alarm import Alarm
from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, fold, known, median, quantile, values_of

FALL, WITHIN = 3.0, 50
MOST = 0.4  # share of the groups that may shrink less than the one that counts
LARGE = 0.05
SAMPLES = 3


class WeightsVanish(Rule):
    """Reports the whole run, with the share that each step removes."""

    name = "weights-vanish"
    source = "the thresholds, 3-fold within 50 steps and 5 %, are omninorm's own; see docs/watching.md"
    explains = (
        "gain-drift",
        "branch-silent",
        "eps-share",
        "learning-rate",
        "adam-eps",
        "depth-growth",
        "unrecovered-spike",
        "no-progress",
        "dead-units",
    )

    def __init__(self) -> None:
        self._streaks = Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        ratios = known(values_of(sample, "update_ratio"))
        if not ratios:
            return
        since, fall = _fall(history, sample)
        vanishes = fall >= FALL and median(ratios) >= LARGE
        fails = self._streaks.lasts("fall", vanishes, sample.step, SAMPLES)
        if vanishes:
            share = 1.0 - fall ** (-1.0 / (sample.step - since))
            evidence = (
                f"Weight decay too large: most weights have shrunk {fold(fall)} since step {since}, "
                f"by about {100 * share:.2g} % per step."
            )
            remedy = f"Lower weight decay: lr × weight_decay is about {share:.2g} per step, and 1e-3 is already a lot."
            yield self.alarm(sample.step, "fail" if fails else "warn", None, evidence, remedy)


def _fall(history: History, sample: Sample) -> tuple[int, float]:
    """Return the oldest sampled step at most 50 steps ago, and the factor by which most groups' weights fell since."""
    start = sample
    for at in range(len(history.samples) - 1, -1, -1):
        if sample.step - history.samples[at].step > WITHIN:
            break
        start = history.samples[at]
    pairs = zip(values_of(start, "weight_rms"), values_of(sample, "weight_rms"), strict=False)
    falls = [then / now for then, now in pairs if then and now]
    if not falls or start.step == sample.step:
        return sample.step, 1.0
    return start.step, max(quantile(falls, MOST), 0.0)
