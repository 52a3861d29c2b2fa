"""Findings that rules report about a checkpoint, and their grouping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

SEVERITIES = ("fail", "warn", "note")
"""fail: the model cannot produce sensible outputs; warn: this is probably a problem; note: this is worth knowing."""


@dataclass(frozen=True)
class Finding:
    """A problem or fact that a rule found in the weights.

    Args:
        severity: one of SEVERITIES.
        rule: the rule's name, such as "gain-drift".
        tensor: the affected tensor (the worst, if there are several); None for the whole checkpoint.
        layer: the block of the tensor, such as "model.layers.7"; None outside of blocks.
        evidence: a sentence with the measured numbers.
        remedy: a sentence that recommends what to do.
        magnitude: a measure of the severity, in a unit of the rule; larger is worse.
        role: findings of the same rule and role are reported as one.
        others: the other tensors of the same rule and role, worst first.
    """

    severity: str
    rule: str
    tensor: str | None
    layer: str | None
    evidence: str
    remedy: str
    magnitude: float = 0.0
    role: str = ""
    others: tuple[str, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values."""
        record = asdict(self)
        del record["role"]
        return {**record, "others": list(self.others)}


def grouped(findings: Iterable[Finding]) -> list[Finding]:
    """Merge findings of the same rule, severity and role, keeping the worst tensor's evidence; most severe first."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in sorted(findings, key=_rank):
        groups.setdefault((finding.severity, finding.rule, finding.role), []).append(finding)
    worst = [_merge(group) for group in groups.values()]
    return sorted(worst, key=_rank)


def _merge(group: list[Finding]) -> Finding:
    first, *rest = group
    return replace(first, others=tuple(each.tensor for each in rest if each.tensor is not None))


def _rank(finding: Finding) -> tuple[int, str, float]:
    return SEVERITIES.index(finding.severity), finding.rule, -finding.magnitude
