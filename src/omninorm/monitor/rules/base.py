"""Rule, the base class of all alarm rules, and Threshold, a rule that compares one signal with fixed limits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from omninorm.monitor.history import Evaluation, Facts, History, Sample, Step
from omninorm.monitor.rules.numbers import Streaks, finite
from omninorm.record.alarm import Alarm
from omninorm.record.signals import SIGNALS, Limit

LOSS_ALARMS = ("loss-spike", "unrecovered-spike", "loss-rising", "gradient-spike")
"""Rules about the curves of the loss and the gradient norm, which anything that harms the training can cause."""
EXTREME_SPAN = 4
"""Steps by which parameters initialized to 0 on purpose have changed, even with a sample at every step."""


class Rule(ABC):
    """Checks every step or every sample, and reports a problem for as long as it lasts.

    A rule may keep state between calls, so each instance belongs to one run. It need not remember what it has
    reported: `omninorm.monitor.alarms.Judge` raises a lasting alarm once. If it reports several layers, the worst comes
    first. It must be cheap, because it runs inside the training loop, and it must handle None, NaN and infinities.

    Example:
        A custom rule, for `omninorm.watch(model, rules=[*default_rules(), Slow()])`:

        >>> class Slow(Rule):
        ...     name = "slow"
        ...     source = "our budget"
        ...
        ...     def on_step(self, history, step):
        ...         if step.step == 1000 and step.loss > 4.0:
        ...             yield self.alarm(step.step, "warn", None, f"The loss is {step.loss:.3g}.", "Train longer.")
        >>> [alarm.rule for alarm in Slow().on_step(History(), Step(1000, 4.5, 1.0, 1e-3))]
        ['slow']
    """

    name: ClassVar[str]
    """Short unique name, copied into alarms."""
    source: ClassVar[str] = ""
    """Origin of its thresholds, copied into alarms."""
    explains: ClassVar[tuple[str, ...]] = ()
    """Names of the rules that report consequences of this one. While this rule has an active alarm, theirs refer to it
    as their cause, so that the cause is read first."""
    symptom: ClassVar[bool] = False
    """Whether it reports that training got worse, but not why: a cause that is measured soon afterwards explains it."""
    structural: ClassVar[bool] = False
    """Whether it reports how the model is built. That lasts, so its warnings explain even a "fail" much later."""

    most_layers: ClassVar[int] = 3
    """If a rule reports more layers than this at once, they become one alarm about the worst."""
    final: ClassVar[bool] = False
    """Whether all other rules are ignored while this one reports."""

    def limits(self) -> Sequence[Limit]:
        """Return the limits on signals that do not change during a run, for the record and its page."""
        return ()

    def bounds(self) -> dict[str, tuple[float | None, float | None]]:
        """Return the current lowest and highest ordinary value of a signal or of the loss, gradient norm or learning
        rate, for rules whose limit changes during a run."""
        return {}

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        """Check a step. Called for every step in order, with `step` already in the history."""
        return ()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        """Check a sample, `history.samples[-1]`. Called after `on_step` for all steps up to it."""
        return ()

    def on_evaluation(self, history: History, evaluation: Evaluation) -> Iterable[Alarm]:
        """Check an evaluation, `history.evaluations[-1]`. Called after `on_step` for all steps up to it."""
        return ()

    def alarm(self, step: int, severity: str, layer: str | None, evidence: str, remedy: str) -> Alarm:
        """Return an alarm of this rule."""
        return Alarm(step, severity, self.name, layer, evidence, remedy, self.source)


class Threshold(Rule):
    """Reports every layer whose signal stays beyond a limit for `persistence` consecutive samples over `span` steps.

    A subclass sets the limits and writes the evidence. A value of None, NaN or infinity neither counts nor interrupts.
    """

    signal: ClassVar[str]
    warn: ClassVar[float | None] = None
    fail: ClassVar[float | None] = None
    below: ClassVar[bool] = False
    """Whether small values are the problem."""
    extreme: ClassVar[float | None] = None
    """Limit beyond which two samples that are `EXTREME_SPAN` steps or more apart are a "fail"."""
    persistence: ClassVar[int] = 1
    span: ClassVar[int] = 0
    """Steps that the samples must span as well: with a sample at every step, a few of them are weak evidence."""
    condition: ClassVar[str] = ""
    """What else `applies` requires, in words for the page."""
    dtype: ClassVar[str] = ""
    """The only dtype of the residual stream in which the rule is active; "" for any."""

    def __init__(self) -> None:
        self._streaks = Streaks()

    def limits(self) -> Sequence[Limit]:
        return (Limit(self.signal, self.name, self.warn, self.fail, self.below, self.condition, self.dtype),)

    @abstractmethod
    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        """Return the evidence and the remedy for the layer at `index` of the signal's axis."""

    def applies(self, history: History, sample: Sample, index: int, value: float) -> bool:
        """Return whether the layer is judged at all; for subclasses with further conditions."""
        return True

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        names = layer_names(history.facts, self.signal)
        loosest = self.fail if self.warn is None else self.warn
        found: list[tuple[bool, float, int, str | None]] = []
        for index, number in enumerate(sample.signals.get(self.signal, ())):
            value = finite(number)
            if value is None or index >= len(names):
                continue
            if not self._beyond(value, loosest) or not self.applies(history, sample, index, value):
                self._streaks.end(index)
                self._streaks.end((index, "fail"))
                self._streaks.end((index, "extreme"))
                continue
            lasting = self._streaks.lasts(index, True, sample.step, self.persistence, self.span)
            severe = self._beyond(value, self.fail)
            failing = self._streaks.lasts((index, "fail"), severe, sample.step, self.persistence, self.span)
            extreme = self._streaks.lasts(
                (index, "extreme"), self._beyond(value, self.extreme), sample.step, 2, EXTREME_SPAN
            )
            if lasting or failing or extreme:
                found.append((failing or extreme, -value if self.below else value, index, names[index]))
        for failed, key, index, layer in sorted(found, key=lambda item: item[:2], reverse=True):
            evidence, remedy = self.explain(history, sample, index, -key if self.below else key)
            yield self.alarm(sample.step, "fail" if failed else "warn", layer, evidence, remedy)

    def _beyond(self, value: float, limit: float | None) -> bool:
        if limit is None:
            return False
        return value < limit if self.below else value > limit


def layer_names(facts: Facts, signal: str) -> Sequence[str | None]:
    """Return the names along the signal's axis; a single None for the axis "run"."""
    axis = SIGNALS[signal].axis if signal in SIGNALS else "run"
    if axis == "block":
        return facts.blocks
    if axis == "norm":
        return [norm.name for norm in facts.norms]
    return facts.groups if axis == "group" else (None,)
