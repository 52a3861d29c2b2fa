"""Alarms grouped by cause: one entry per rule and cause, with its layers, and its consequences below it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from omninorm.report.story import StoryAlarm
from omninorm.report.verdict import explain

# As omninorm.monitor.alarms writes it at the end of an alarm's evidence.
_CONSEQUENCE = re.compile(r" ?Probably a consequence of ([^ ]{1,80})(?: in (.{1,300}?))? at step (\d{1,15})\.$")
_NUMBER = re.compile(r"\d[\d.,]*(?:e[-+]?\d+)?")


@dataclass
class Cause:
    """The alarms of one rule about one cause.

    Args:
        rule: the name of the rule.
        title: the cause in a few words.
        parent: the rule of which this one reports a consequence, or None.
        evidence: the rest of the evidence of the alarm to quote.
        alarms: numbers and alarms, oldest first.
        consequences: the causes that follow from this one.
    """

    rule: str
    title: str
    parent: str | None
    evidence: str = ""
    alarms: list[tuple[int, StoryAlarm]] = field(default_factory=list)
    consequences: list[Cause] = field(default_factory=list)

    @property
    def severity(self) -> str:
        """ "fail" if any of the alarms is one."""
        return "fail" if any(alarm.severity == "fail" for _, alarm in self.alarms) else "warn"

    @property
    def lead(self) -> StoryAlarm:
        """The alarm to quote: the first of the gravest ones."""
        return next(alarm for _, alarm in self.alarms if alarm.severity == self.severity)

    @property
    def first(self) -> int:
        return self.alarms[0][1].step

    @property
    def last(self) -> int:
        return self.alarms[-1][1].step

    @property
    def layers(self) -> list[tuple[int, StoryAlarm]]:
        """The alarms that name a layer, one per layer: its gravest, with the number."""
        found: dict[str, tuple[int, StoryAlarm]] = {}
        for number, alarm in self.alarms:
            known = found.get(alarm.layer or "")
            if alarm.layer and (known is None or (alarm.severity == "fail" and known[1].severity != "fail")):
                found[alarm.layer] = (number, alarm)
        return list(found.values())


def causes(alarms: Sequence[StoryAlarm]) -> list[Cause]:
    """Return the causes, failures before warnings, then by step; consequences are in the list of their cause."""
    found: dict[tuple[str, str, str | None], Cause] = {}
    for number, alarm in enumerate(alarms):
        parent = consequence_of(alarm)
        title, _ = explain(alarm)
        key = (alarm.rule, _without_details(title, alarm.layer), parent)
        found.setdefault(key, Cause(alarm.rule, title, parent)).alarms.append((number, alarm))
    for cause in found.values():
        cause.title, cause.evidence = explain(_without_parent(cause.lead), several=len(cause.layers) > 1)
    return _nest(sorted(found.values(), key=lambda cause: (cause.severity != "fail", cause.first)))


def consequence_of(alarm: StoryAlarm) -> str | None:
    """Return the rule that the alarm names as its probable cause."""
    match = _CONSEQUENCE.search(alarm.evidence)
    return match[1] if match else None


def _without_parent(alarm: StoryAlarm) -> StoryAlarm:
    """Return the alarm without the sentence about the cause that it follows."""
    return replace(alarm, evidence=_CONSEQUENCE.sub("", alarm.evidence))


def _nest(ordered: Sequence[Cause]) -> list[Cause]:
    """Move consequences to the earliest cause of their rule that is none itself; without one they stay."""
    roots: dict[str, Cause] = {}
    for cause in ordered:
        if cause.parent is None:
            roots.setdefault(cause.rule, cause)
    top: list[Cause] = []
    for cause in ordered:
        owner = roots.get(cause.parent or "")
        (top if owner is None else owner.consequences).append(cause)
    return top


def _without_details(title: str, layer: str | None) -> str:
    """Return the title without the layer and numbers, which differ among alarms about the same cause."""
    return _NUMBER.sub("#", title.replace(layer, "#") if layer else title)
