"""logz: the output's normalizer drifts away, so the logits grow or sink as a whole.

Signal: the mean of log Z over tokens, or where that is not known its value of the largest magnitude. Threshold: more
than 10 away from the first sample's (log Z starts near ln of the vocabulary's size, which may itself exceed 10) and
further away than 8 samples before [ours]. Persistence: 5 samples over 50 steps. A warning: the softmax does not see
such a drift, but low precision does.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, Sample
from omninorm.watch.rules.base import Rule
from omninorm.watch.rules.numbers import Streaks, earlier, value_at

DRIFT = 10.0
SAMPLES = 8


class LogZ(Rule):
    """Compares log Z with its start."""

    name = "logz"
    source = "drift of log Z is described in PaLM's report, arXiv 2204.02311; the limit of 10 is omninorm's own"

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._first: dict[str, float] = {}

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        signal = "logz_mean" if "logz_mean" in sample.signals else "logz"
        value = value_at(sample, signal)
        if value is None:
            return
        first = self._first.setdefault(signal, value)
        past = earlier(history, signal, 0, SAMPLES)
        drifts = abs(value - first) > DRIFT and bool(past) and abs(value - first) > abs(past[0] - first)
        if self._streaks.lasts("drift", drifts, sample.step, 5, 50):
            evidence = f"log Z is {value:.3g} and drifts on; it was {first:.3g} at first."
            remedy = "Add a z-loss, 1e-4 · (log Z)², or weight decay on the output matrix."
            yield self.alarm(sample.step, "warn", None, evidence, remedy)
