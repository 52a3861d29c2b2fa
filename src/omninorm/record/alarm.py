"""Alarm: a problem that a rule reports, with its form in the record and its links to causes and consequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

SEVERITIES = ("warn", "fail")
Raised = TypeVar("Raised", bound="Alarm")


@dataclass(frozen=True)
class AlarmRef:
    """A reference to an alarm of a run: its step, rule and layer identify it."""

    step: int
    rule: str
    layer: str | None = None

    def __str__(self) -> str:
        return f"{self.rule}{f' in {self.layer}' if self.layer else ''} at step {self.step}"


@dataclass(frozen=True)
class Alarm:
    """A problem that a rule has found, persistent enough to report.

    Args:
        step: the step at which it was raised, counted from 1.
        severity: "warn", which a healthy run may raise, or "fail": the run will not succeed unless something changes.
        rule: the rule's name, such as "attention-logits".
        layer: the affected module or parameter; None for the whole run.
        evidence: the measurements, with numbers, in one or two sentences.
        remedy: what to try, in one or two sentences.
        source: the origin of the threshold.
        cause: the alarm that probably caused this one; None if no cause is known.
        explains: earlier alarms that are probably consequences of this one.
    """

    step: int
    severity: str
    rule: str
    layer: str | None
    evidence: str
    remedy: str
    source: str = ""
    cause: AlarmRef | None = None
    explains: tuple[AlarmRef, ...] = ()

    @property
    def ref(self) -> AlarmRef:
        return AlarmRef(self.step, self.rule, self.layer)

    @property
    def linked_evidence(self) -> str:
        """The evidence, followed by the alarm's cause and consequences."""
        parts = [self.evidence]
        if self.cause:
            parts.append(f"Probably a consequence of {self.cause}.")
        if self.explains:
            parts.append(f"It probably explains {' and '.join(map(str, self.explains))}.")
        return " ".join(parts)

    @property
    def text(self) -> str:
        """The evidence with cause and consequences, and the remedy."""
        return f"{self.linked_evidence} {self.remedy}"

    def to_record(self) -> dict[str, Any]:
        """Return the alarm as an item of the event "alarms" in record.jsonl; missing links are left out."""
        stored = asdict(self)
        return {name: value for name, value in stored.items() if value or name not in ("cause", "explains")}

    @classmethod
    def from_record(cls: type[Raised], stored: Mapping[str, Any], step: int) -> Raised:
        """Return a recorded alarm; values of the wrong type are replaced. `step` is the step of its event."""
        texts = {name: _text(stored.get(name)) or "" for name in ("evidence", "remedy", "source")}
        ref, cause, explains = _ref(stored, step), stored.get("cause"), stored.get("explains")
        explained = explains if isinstance(explains, list) else ()
        return cls(
            ref.step,
            "fail" if stored.get("severity") == "fail" else "warn",
            ref.rule,
            ref.layer,
            **texts,
            cause=_ref(cause, step) if isinstance(cause, dict) else None,
            explains=tuple(_ref(each, step) for each in explained if isinstance(each, dict)),
        )


def link(alarms: Sequence[Raised]) -> list[Raised]:
    """Return the alarms in order. An alarm that explains another one becomes its cause, unless that one has a cause."""
    causes = {explained: alarm.ref for alarm in alarms for explained in alarm.explains}
    return [
        replace(alarm, cause=alarm.cause or causes[alarm.ref]) if alarm.ref in causes else alarm for alarm in alarms
    ]


def roots(alarms: Sequence[Raised]) -> list[Raised]:
    """Return for each alarm its first cause among the alarms, or the alarm itself if it has no cause there."""
    known = {alarm.ref: alarm for alarm in reversed(alarms)}
    return [_root(alarm, known) for alarm in alarms]


def leading(alarms: Sequence[Raised]) -> Raised | None:
    """Return the alarm to read first: the first cause of the first "fail", or the first warning without a "fail"."""
    places = range(len(alarms))
    first = min(places, key=lambda place: (alarms[place].severity != "fail", alarms[place].step), default=None)
    return None if first is None else roots(alarms)[first]


def _root(alarm: Raised, known: Mapping[AlarmRef, Raised]) -> Raised:
    root, passed = alarm, {alarm.ref}
    while root.cause is not None and root.cause in known:
        root = known[root.cause]
        if root.ref in passed:  # a cycle, which only a damaged record has
            return alarm
        passed.add(root.ref)
    return root


def _ref(stored: Mapping[str, Any], step: int) -> AlarmRef:
    given = stored.get("step")
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < 2**53:
        step = given
    return AlarmRef(step, _text(stored.get("rule")) or "unnamed", _text(stored.get("layer")))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
