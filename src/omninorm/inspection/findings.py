"""Finding: what a rule says about a checkpoint; and how many of one kind become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

SEVERITIES = ("fail", "warn", "note")
"""fail: the model cannot compute sensibly; warn: look at it; note: worth knowing, nothing is wrong."""


@dataclass(frozen=True)
class Finding:
    """A rule found something in the weights.

    Args:
        severity: one of SEVERITIES.
        rule: the rule's name, such as "gain-drift".
        tensor: the tensor it is about, the worst if there are several; None where it is the whole checkpoint.
        layer: the block that the tensor lies in, such as "model.layers.7"; None outside of blocks.
        evidence: what was measured, with numbers, in a sentence.
        remedy: what to do, in a sentence.
        magnitude: how bad it is, in the rule's own unit; larger is worse.
        role: findings of one rule and one role are told together.
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
        """As plain JSON values."""
        record = asdict(self)
        del record["role"]
        return {**record, "others": list(self.others)}


def grouped(findings: Iterable[Finding]) -> list[Finding]:
    """One finding per rule, severity and role, with the worst tensor's evidence; the most severe first."""
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
