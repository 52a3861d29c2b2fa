"""weights-vanish: weight decay shrinks the weights faster than the gradient can rebuild them.

Signals: RMS(w) and RMS(Δw)/RMS(w) of a step, by group of parameters. Threshold: within 50 steps the weights of six of
ten groups fell at least 3-fold, while the median update is 5 % of the weights or more. [ours] Training lets weights
grow or keeps them; AdamW's ordinary decay, lr × weight_decay, takes 1e-5 to 1e-3 of them a step.
Persistence: 3 samples running are a "fail"; before that it is a warning.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, Sample
from omninorm.watch.rules.base import Rule
from omninorm.watch.rules.numbers import Streaks, fold, known, median, quantile, values_of

FALL, WITHIN = 3.0, 50
MOST = 0.4  # share of the groups that may fall less than the one that counts
LARGE = 0.05
SAMPLES = 3


class WeightsVanish(Rule):
    """About the whole run, with the share that a step takes away."""

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
                f"Weight decay too large: from step {since} on most weights shrank {fold(fall)}, "
                f"by about {100 * share:.2g} % a step."
            )
            remedy = f"Lower weight decay: lr × weight_decay is about {share:.2g} per step, where 1e-3 is much."
            yield self.alarm(sample.step, "fail" if fails else "warn", None, evidence, remedy)


def _fall(history: History, sample: Sample) -> tuple[int, float]:
    """The oldest step not more than 50 before, and by what factor the weights of most groups fell since."""
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
