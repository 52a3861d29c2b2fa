"""Alarm: one report of a rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SEVERITIES = ("warn", "fail")


@dataclass(frozen=True)
class Alarm:
    """A problem that a rule has found, persistent enough to report.

    Args:
        step: the step at which it was raised, counted from 1.
        severity: "warn", which a healthy run may raise, or "fail": the run will not succeed unless something changes.
        rule: the rule's name, such as "attention-logits".
        layer: the module or parameter concerned; None for the whole run.
        evidence: what was measured, with numbers, in one or two sentences.
        remedy: what to try, in one or two sentences.
        source: the origin of the threshold.
    """

    step: int
    severity: str
    rule: str
    layer: str | None
    evidence: str
    remedy: str
    source: str = ""

    def to_record(self) -> dict[str, Any]:
        """Return the alarm as an item of the event "alarms" in record.jsonl."""
        return asdict(self)
