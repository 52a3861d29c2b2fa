"""no-progress: the loss has not fallen in 60 steps, or has stopped falling because the updates have become tiny.

Signals: the loss; the learning rate and RMS(Δw)/RMS(w), where they are known. Threshold: the mean of the newest 20
losses is not below that of the first 5 by 1 % and by 3 standard errors, and never was, and one of these holds: the
newest 20 learning rates are all 0; the median update of the two newest samples is below 1e-6; or the two means differ
by less than 3 standard errors, which is noise; updates below 2e-4 are then named as the cause (healthy runs: 1e-3 to
3e-2), also at steps 60 to 120 of an untrained language model whose loss has fallen by less than 10 %. After the loss
has fallen, a plateau is normal. Then the alarm needs an exact reason: the median update of the two newest samples is
less than a tenth of its earlier median although the learning rate is at least half of its earlier median, and the loss
has not fallen by 1 % in 60 steps. [ours] Persistence: 60 steps. The loss of a pretrained model in fine-tuning may be
just as flat, so the alarm asks whether this is intended and is never more than a warning. It is not raised while the
learning rate rises (a warm-up), and in a resumed run not for noise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import finite, fold, known, median, value_at, values_of
from omninorm.monitor.rules.rolling import Rolling
from omninorm.record.alarm import Alarm

FEWEST, FIRST, NEWEST = 60, 5, 20
LEARNED = 0.01
TINY, SMALL = 1e-6, 2e-4
SLOW = 0.1  # of the first loss
LEAST, MOST, NEAR = 3.5, 13.0, 0.25  # a first loss between ln 32 and ln 440,000, at most this far from log Z
SHRUNK, KEPT, PAST = 0.1, 0.5, 12  # of the earlier update and learning rate, and the samples they are the medians of
ERRORS = 3.0


class NoProgress(Rule):
    """Reports the whole run, with the cause where it is known."""

    name = "no-progress"
    source = "the thresholds, 1 % within 60 steps and updates of 1e-6, are omninorm's own; see docs/watching.md"
    symptom = True

    def __init__(self) -> None:
        self._first: list[float] = []
        self._start: int | None = None
        self._newest: deque[float] = deque(maxlen=NEWEST)
        self._rates: deque[float | None] = deque(maxlen=NEWEST)
        self._noise = Rolling()
        self._count = 0
        self._learned = False
        self._since: deque[float] = deque(maxlen=FEWEST)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        """Check whether learning has stopped because the updates have become tiny."""
        change = _shrunk_updates(history) if self._learned else None
        if change and len(self._since) == FEWEST:
            half = FEWEST // 2
            before, now = sum(list(self._since)[:half]) / half, sum(list(self._since)[half:]) / half
            if before - now < LEARNED * abs(before):
                evidence = (
                    f"Updates have shrunk {fold(change[0] / change[1])}: from {change[0]:.1g} to {change[1]:.1g} of "
                )
                evidence += f"the weights per step, at an unchanged learning rate; the loss has stayed at {now:.4g}."
                remedy = (
                    "Check what has changed since: gradient clipping, frozen parameters, or a part of the model that "
                )
                remedy += "saturates and passes no gradient."
                yield self.alarm(sample.step, "warn", None, evidence, remedy)

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss = finite(step.loss)
        self._rates.append(finite(step.lr))
        self._start = self._start or step.step
        if loss is not None:
            self._since.append(loss)
        if loss is None or (self._learned and self._count >= 2 * FEWEST):
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
        self._learned = self._learned or before - now >= max(LEARNED * abs(before), noise)
        cause = None
        if self._count >= FEWEST:
            slow = before - now < SLOW * abs(before) and began_untrained(history, self._first[0])
            cause = self._slow(history, step) if self._learned and slow else None
            cause = cause if self._learned else self._cause(history, step, abs(before - now) <= noise)
        if cause:
            evidence = f"{cause[0]}: over {self._count} steps the loss went from {before:.4g} to {now:.4g}."
            yield self.alarm(step.step, "warn", None, evidence, cause[1])

    def _error(self) -> float:
        """Return the standard error of the difference between the mean of the first and of the newest losses."""
        expected = self._noise.expected()
        return expected[1] * math.sqrt(1 / FIRST + 1 / NEWEST) if expected else 0.0

    def _slow(self, history: History, step: Step) -> tuple[str, str] | None:
        """Return small updates as the cause, with the remedy; None if they are ordinary or unknown, or in a warm-up."""
        rates, update = known(self._rates), _update(history, step.step)
        if update is None or update >= SMALL or (rates and rates[-1] > rates[0]):
            return None
        words = f"Updates are only {update:.1g} of the weights per step (1e-3 to 1e-2 is usual)"
        remedy = "Raise the learning rate, and check that gradients are not clipped to a tiny norm. Expected when "
        return words, remedy + "fine-tuning."

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
        if self._start == 1 and is_noise and (small := self._slow(history, step)):
            return small
        if self._start == 1 and is_noise:
            remedy = (
                "Expected when fine-tuning. Otherwise train on a single batch: if its loss falls, check the data and "
            )
            remedy += "labels; if not, the learning rate and the parameters that the optimizer holds."
            return "The loss has not fallen", remedy
        return None


def began_untrained(history: History, first_loss: float) -> bool:
    """Return whether a language model began untrained: its first loss was about log Z = ln(vocabulary)."""
    sample = history.samples[0] if history.samples else None
    logz = value_at(sample, "logz_mean") if sample and sample.step == 1 else None
    return logz is not None and LEAST <= first_loss <= MOST and abs(first_loss - logz) <= NEAR * first_loss


def _shrunk_updates(history: History) -> tuple[float, float] | None:
    """Return the earlier and the present median update if it shrank 10-fold and the learning rate did not."""
    samples = [sample for sample in list(history.samples)[-PAST - 2 :] if sample.step > 1]
    updates = [median(ratios) for sample in samples if (ratios := known(values_of(sample, "update_ratio")))]
    if len(updates) < 6 or len(updates) != len(samples):
        return None
    rates = {step.step: finite(step.lr) for step in history.steps}
    then, now = [rates.get(sample.step) for sample in samples[:-2]], rates.get(samples[-1].step)
    before, newest = median(updates[:-2]), max(updates[-2:])
    if not now or now < KEPT * median(known(then) or [now]):
        return None
    return (before, newest) if 0.0 < newest < SHRUNK * before else None


def _update(history: History, step: int) -> float | None:
    """Return the larger median update of the two newest samples; None if they are unknown."""
    newest = [sample for sample in list(history.samples)[-2:] if 1 < sample.step <= step]
    medians = [median(ratios) for sample in newest if (ratios := known(values_of(sample, "update_ratio")))]
    return max(medians) if len(medians) == 2 else None
