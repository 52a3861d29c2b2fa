"""Alarm: what a rule says, and nothing more."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SEVERITIES = ("warn", "fail")


@dataclass(frozen=True)
class Alarm:
    """A rule found something wrong for long enough to say so.

    Args:
        step: the step at which it was raised, counted from 1.
        severity: "warn", which a healthy run may raise, or "fail": this run is lost unless something changes.
        rule: the rule's name, such as "attention-logits".
        layer: the module or parameter it is about; None where it is the whole run.
        evidence: what was measured, with numbers, in a sentence.
        remedy: what to try, in a sentence.
        source: where the threshold comes from.
    """

    step: int
    severity: str
    rule: str
    layer: str | None
    evidence: str
    remedy: str
    source: str = ""

    def to_record(self) -> dict[str, Any]:
        """As a part of an event "alarms" in record.jsonl."""
        return asdict(self)
