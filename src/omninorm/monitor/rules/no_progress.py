"""no-progress: the loss has not fallen in 60 steps.

Signals: the loss; the learning rate and RMS(Δw)/RMS(w), where they are known. Threshold: the mean of the newest 20
losses is not below that of the first 5 by 1 % and by 3 standard errors, and never was, and one of these holds: the
newest 20 learning rates are all 0; the median update of the two newest samples is below 1e-6; or the two means differ
by less than 3 standard errors, which is noise. [ours] Persistence: 60 steps.
The loss of a pretrained model in fine-tuning may be just as flat, so the alarm asks whether this is intended and is
never more than a warning. It is not raised while the learning rate rises (a warm-up), and in a resumed run not for
noise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from omninorm.monitor.alarm import Alarm
from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import finite, known, median, values_of
from omninorm.monitor.rules.rolling import Rolling

FEWEST, FIRST, NEWEST = 60, 5, 20
LEARNED = 0.01
TINY = 1e-6
ERRORS = 3.0


class NoProgress(Rule):
    """Reports the whole run, with the cause where it is known."""

    name = "no-progress"
    source = "the thresholds, 1 % within 60 steps and updates of 1e-6, are omninorm's own; see docs/watching.md"

    def __init__(self) -> None:
        self._first: list[float] = []
        self._start: int | None = None
        self._newest: deque[float] = deque(maxlen=NEWEST)
        self._rates: deque[float | None] = deque(maxlen=NEWEST)
        self._noise = Rolling()
        self._count = 0
        self._learned = False

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss = finite(step.loss)
        self._rates.append(finite(step.lr))
        self._start = self._start or step.step
        if loss is None or self._learned:
            return
        self._count += 1
        self._noise.add(loss, self._noise.expected())
        self._newest.append(loss)
        if len(self._first) < FIRST:
            self._first.append(loss)
        if self._count < FIRST + NEWEST:
            return
        before, now = sum(self._first) / FIRST, sum(self._newest) / NEWEST
        noise = ERRORS * self._error()
        self._learned = before - now >= max(LEARNED * abs(before), noise)
        cause = (
            None if self._learned or self._count < FEWEST else self._cause(history, step, abs(before - now) <= noise)
        )
        if cause:
            evidence = f"{cause[0]}: over {self._count} steps the loss went from {before:.4g} to {now:.4g}."
            yield self.alarm(step.step, "warn", None, evidence, cause[1])

    def _error(self) -> float:
        """Return the standard error of the difference between the mean of the first and of the newest losses."""
        expected = self._noise.expected()
        return expected[1] * math.sqrt(1 / FIRST + 1 / NEWEST) if expected else 0.0

    def _cause(self, history: History, step: Step, is_noise: bool) -> tuple[str, str] | None:
        """Return the cause in a few words and the remedy; None if the loss need not have fallen yet."""
        rates = known(self._rates)
        if len(rates) == NEWEST and not any(rates):
            return "Learning rate 0, no weight changes", "If this is not intended, check the learning-rate schedule."
        if len(rates) > 1 and rates[-1] > rates[0]:
            return None
        update = _update(history, step.step)
        if update is not None and update < TINY:
            words = f"Updates are only {update:.1g} of the weights"
            return words, "If this is not intended, raise the learning rate and check for frozen parameters."
        if self._start == 1 and is_noise:
            remedy = "Expected when fine-tuning. Otherwise check the labels, the learning rate and the parameters that "
            remedy += "the optimizer holds."
            return "The loss has not fallen", remedy
        return None


def _update(history: History, step: int) -> float | None:
    """Return the larger median update of the two newest samples; None if they are unknown."""
    newest = [sample for sample in list(history.samples)[-2:] if 1 < sample.step <= step]
    medians = [median(ratios) for sample in newest if (ratios := known(values_of(sample, "update_ratio")))]
    return max(medians) if len(medians) == 2 else None
