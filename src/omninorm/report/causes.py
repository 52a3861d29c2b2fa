"""Alarms grouped by cause: one entry per rule and cause, with its layers, and its consequences below it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from omninorm.record.alarm import AlarmRef, roots
from omninorm.report.story import StoryAlarm
from omninorm.report.verdict import explain

_NUMBER = re.compile(r"\d[\d.,]*(?:e[-+]?\d+)?")


@dataclass
class Cause:
    """The alarms of one rule about one cause.

    Args:
        rule: the name of the rule.
        title: the cause in a few words.
        parent: the alarm of which these are consequences, or None.
        evidence: the rest of the evidence of the alarm to quote.
        alarms: numbers and alarms, oldest first.
        consequences: the causes that follow from this one.
    """

    rule: str
    title: str
    parent: AlarmRef | None
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
    homes: dict[AlarmRef, Cause] = {}
    for number, (alarm, root) in enumerate(zip(alarms, roots(alarms), strict=True)):
        parent = None if root is alarm else root.ref
        title, _ = explain(alarm)
        key = (alarm.rule, _without_details(title, alarm.layer), parent.rule if parent else None)
        home = homes[alarm.ref] = found.setdefault(key, Cause(alarm.rule, title, parent))
        home.alarms.append((number, alarm))
    for cause in found.values():
        cause.title, cause.evidence = explain(cause.lead, several=len(cause.layers) > 1)
        if cause.parent:
            homes[cause.parent].consequences.append(cause)
    for cause in found.values():
        cause.consequences.sort(key=_gravest)
    return sorted((cause for cause in found.values() if cause.parent is None), key=_gravest)


def _gravest(cause: Cause) -> tuple[bool, int]:
    """Sort a cause by the severity of its alarms and of those that follow from it, then by step."""
    return all(each.severity != "fail" for each in (cause, *cause.consequences)), cause.first


def _without_details(title: str, layer: str | None) -> str:
    """Return the title without the layer and numbers, which differ among alarms about the same cause."""
    return _NUMBER.sub("#", title.replace(layer, "#") if layer else title)
