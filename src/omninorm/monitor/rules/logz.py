"""logz: the output's normalizer drifts, so the logits grow or shrink as a whole.

Signal: the mean of log Z over tokens or, where that is unknown, its value of the largest magnitude. Threshold: more
than 10 away from the first sample's value (log Z begins near ln of the vocabulary size, which may itself exceed 10)
and further away than 8 samples earlier [ours]. Persistence: 5 samples over 50 steps. It is a warning: the softmax is
invariant to such a drift, but low precision is not.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, earlier, value_at
from omninorm.record.alarm import Alarm

DRIFT = 10.0
SAMPLES = 8


class LogZ(Rule):
    """Compares log Z with its first value."""

    name = "logz"
    source = "drift of log Z is described in PaLM's report, arXiv 2204.02311; the limit of 10 is omninorm's own"

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._first: dict[str, float] = {}

    def bounds(self) -> dict[str, tuple[float | None, float | None]]:
        return {signal: (first - DRIFT, first + DRIFT) for signal, first in self._first.items()}

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        signal = "logz_mean" if "logz_mean" in sample.signals else "logz"
        value = value_at(sample, signal)
        if value is None:
            return
        first = self._first.setdefault(signal, value)
        past = earlier(history, signal, 0, SAMPLES)
        drifts = abs(value - first) > DRIFT and bool(past) and abs(value - first) > abs(past[0] - first)
        if self._streaks.lasts("drift", drifts, sample.step, 5, 50):
            evidence = f"log Z has drifted from {first:.3g} to {value:.3g} and is still drifting."
            remedy = "Add a z-loss, 1e-4 · (log Z)², or apply weight decay to the output matrix."
            yield self.alarm(sample.step, "warn", None, evidence, remedy)
