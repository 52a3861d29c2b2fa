"""Rule: one way in which a training run goes wrong; and Threshold, the kind that compares a signal with two numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from omninorm.record.signals import SIGNALS
from omninorm.watch.alarm import Alarm
from omninorm.watch.history import Facts, History, Sample, Step
from omninorm.watch.rules.numbers import Streaks, finite

EXTREME_SPAN = 4
"""What starts at 0 on purpose has learned by then, with a sample at every step, too."""


class Rule(ABC):
    """Looks at every step or at every sample, and reports what is wrong for as long as it is wrong.

    A rule may keep a state of its own between calls, so it belongs to one run. It need not remember what it has
    reported: `omninorm.watch.judge.Judge` raises a lasting alarm once. If it reports several layers, the worst comes
    first. It must be cheap, since it runs inside of the training loop, and it must expect None, NaN and infinities.

    Example:
        A rule of your own, for `omninorm.watch(model, rules=[*default_rules(), Slow()])`:

        >>> class Slow(Rule):
        ...     name = "slow"
        ...     source = "our budget"
        ...
        ...     def on_step(self, history, step):
        ...         if step.step == 1000 and step.loss > 4.0:
        ...             yield self.alarm(step.step, "warn", None, f"loss {step.loss:.3g} at step 1000", "train longer")
        >>> [alarm.rule for alarm in Slow().on_step(History(), Step(1000, 4.5, 1.0, 1e-3))]
        ['slow']
    """

    name: ClassVar[str]
    """Short and unique; alarms carry it."""
    source: ClassVar[str] = ""
    """Where its thresholds come from; alarms carry it."""
    explains: ClassVar[tuple[str, ...]] = ()
    """Names of rules that report consequences of this one. While this one has a "fail" standing, their alarms become
    warnings that refer to it, so that the cause is what is read first."""

    most_layers: ClassVar[int] = 3
    """If it reports more layers at once, they become one alarm about the worst."""
    final: ClassVar[bool] = False
    """Whether nothing else is judged for as long as this rule reports."""

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        """Called for every step, in order, with `step` already in the history."""
        return ()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        """Called for every sample, `history.samples[-1]`, after `on_step` for all steps up to it."""
        return ()

    def alarm(self, step: int, severity: str, layer: str | None, evidence: str, remedy: str) -> Alarm:
        """An alarm of this rule."""
        return Alarm(step, severity, self.name, layer, evidence, remedy, self.source)


class Threshold(Rule):
    """Reports every layer whose signal stays beyond a threshold for `persistence` samples and `span` steps running.

    A subclass sets the numbers and words the evidence. A value of None, NaN or infinity neither counts nor interrupts.
    """

    signal: ClassVar[str]
    warn: ClassVar[float | None] = None
    fail: ClassVar[float | None] = None
    below: ClassVar[bool] = False
    """Whether it is the small values that are wrong."""
    extreme: ClassVar[float | None] = None
    """A "fail" at the second sample beyond it that is `EXTREME_SPAN` steps or more after the first."""
    persistence: ClassVar[int] = 1
    span: ClassVar[int] = 0
    """Steps that the samples must span, too: with a sample at every step a few of them say little."""

    def __init__(self) -> None:
        self._streaks = Streaks()

    @abstractmethod
    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        """Evidence and remedy, a sentence each, for the layer at `index` of the signal's axis."""

    def applies(self, history: History, sample: Sample, index: int, value: float) -> bool:
        """Whether the layer may be judged at all; for subclasses with further conditions."""
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
    """Names along the signal's axis; for "run" a single None."""
    axis = SIGNALS[signal].axis if signal in SIGNALS else "run"
    if axis == "block":
        return facts.blocks
    if axis == "norm":
        return [norm.name for norm in facts.norms]
    return facts.groups if axis == "group" else (None,)
