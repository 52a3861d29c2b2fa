"""Scoring: whether the alarms of a run report its fault, its cause and its layer.

An alarm counts if it is raised after the fault has begun and the healthy twin does not raise it by then: a false alarm
detects nothing. The leading alarm, which decides about the cause, is the one that the page shows first: what the first
"fail" follows from; without a fail, the first warning.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faults.faults import Fault, load_faults

from omninorm.record.alarm import Alarm, AlarmRef, leading

Line = dict[str, Any]
SOON = 20
"""Faults that are visible at once should be detected within this many steps."""
STEP, SEVERITY, RULE, LAYER, EVIDENCE, CAUSE = range(6)


@dataclass(frozen=True)
class Verdict:
    """The judgement of a faulty run.

    Args:
        line: the run.
        fault: its fault.
        effect: whether the run differs measurably from its healthy twin.
        steps: the number of steps from the fault to the first alarm; None if it was not detected.
        cause: whether the leading alarm names the cause.
        named: whether any alarm names the cause.
        layer: whether an alarm that names the cause also names the right layer; None if there is nothing to judge.
        leading: the rule of the leading alarm.
    """

    line: Line
    fault: Fault
    effect: bool
    steps: int | None
    cause: bool
    named: bool
    layer: bool | None
    leading: str | None

    @property
    def detected(self) -> bool:
        """Return whether any alarm was raised because of the fault."""
        return self.steps is not None


def judge(line: Line, twin: Line | None) -> Verdict:
    """Return the verdict on a faulty run."""
    fault = load_faults()[line["fault"]]
    alarms = new_alarms(line, twin)
    leading = leading_alarm(alarms)
    naming = [alarm for alarm in alarms if names_cause(alarm, fault)]
    layer = None
    if naming and fault.layered and line["layers"]:
        layer = any(is_layer(alarm[LAYER], line["layers"]) for alarm in naming)
    return Verdict(
        line,
        fault,
        bool(line["has_effect"]),
        alarms[0][STEP] - line["begins"] if alarms else None,
        leading is not None and names_cause(leading, fault),
        bool(naming),
        layer,
        None if leading is None else leading[RULE],
    )


def leading_alarm(alarms: Sequence[Sequence[Any]]) -> Sequence[Any] | None:
    """Return the alarm that a user reads first."""
    causes = [AlarmRef(*alarm[CAUSE]) if len(alarm) > CAUSE else None for alarm in alarms]
    found = [Alarm(*alarm[:CAUSE], "", cause=cause) for alarm, cause in zip(alarms, causes, strict=True)]
    first = leading(found)
    return None if first is None else alarms[found.index(first)]


def names_cause(alarm: Sequence[Any], fault: Fault) -> bool:
    """Return whether an alarm names the fault's cause, by its rule or by its rule and first words."""
    for cause in fault.causes:
        rule, _, words = cause.partition(":")
        if alarm[RULE] == rule and alarm[EVIDENCE].startswith(words):
            return True
    return False


def new_alarms(line: Line, twin: Line | None) -> list[list[Any]]:
    """Return a run's alarms after the fault has begun, without those that its healthy twin has raised by then.

    Parameters without an optimizer are reported before the first step, so alarms of the step before count as well.
    """
    seen = [] if twin is None else [(a[RULE], a[LAYER], a[STEP]) for a in twin["alarms"]]
    return [
        alarm
        for alarm in line["alarms"]
        if alarm[STEP] >= line["begins"] - 1
        and not any((rule, layer) == (alarm[RULE], alarm[LAYER]) and step <= alarm[STEP] for rule, layer, step in seen)
    ]


def is_layer(named: str | None, layers: Iterable[str]) -> bool:
    """Return whether an alarm's layer is one of the modules at fault, a part of one, or the block around one."""
    if named is None:
        return False
    inside = any(named == layer or named.startswith(f"{layer}.") for layer in layers)
    is_block = any(part.isdigit() for part in named.split("."))
    return inside or (is_block and any(layer.startswith(f"{named}.") for layer in layers))


def verdicts(lines: Sequence[Line]) -> list[Verdict]:
    """Return the verdicts on all faulty runs."""
    twins = {line["key"]: line for line in lines if line["fault"] is None}
    known = load_faults()
    return [judge(line, twins.get(twin_key(line))) for line in lines if line["fault"] in known]


def twin_key(line: Mapping[str, Any]) -> str:
    """Return the key of a run's healthy twin."""
    return "/".join((line["architecture"], line["variant"], str(line["seed"]), "healthy"))


@dataclass(frozen=True)
class Score:
    """Counts over a set of faulty runs, each as (how many, of how many).

    Args:
        recall: runs with an effect that raised an alarm.
        cause: runs with an effect whose leading alarm names the cause.
        named: runs with an effect in which any alarm names the cause.
        layer: runs with a layer and a named cause in which the layer is right.
        soon: runs with an effect that is visible at once, detected within 20 steps.
        median: the median number of steps to detection.
        without_effect: runs that do not differ from their twin; they count nowhere else.
    """

    recall: tuple[int, int]
    cause: tuple[int, int]
    named: tuple[int, int]
    layer: tuple[int, int]
    soon: tuple[int, int]
    median: float | None
    without_effect: int


def score(found: Sequence[Verdict]) -> Score:
    """Return the score of some verdicts."""
    real = [v for v in found if v.effect]
    layered = [v for v in real if v.layer is not None]
    quick = [v for v in real if v.fault.at_once]
    steps = [v.steps for v in real if v.steps is not None]
    return Score(
        (sum(v.detected for v in real), len(real)),
        (sum(v.cause for v in real), len(real)),
        (sum(v.named for v in real), len(real)),
        (sum(bool(v.layer) for v in layered), len(layered)),
        (sum(v.steps is not None and v.steps <= SOON for v in quick), len(quick)),
        statistics.median(steps) if steps else None,
        len(found) - len(real),
    )


@dataclass(frozen=True)
class Health:
    """Counts over healthy runs: all, those with a fail, those with a warning but no fail, and alarms by rule."""

    runs: int
    fails: int
    warnings: int
    rules: Counter[tuple[str, str]]


def healthy_runs(lines: Iterable[Line]) -> list[Line]:
    """Return the runs without a fault. Twins whose learning rate is 100 times too low are none: a warning is right."""
    return [line for line in lines if line["fault"] is None and line["variant"] != "tiny learning rate"]


def health(lines: Iterable[Line]) -> Health:
    """Return how many healthy runs raised alarms, and which: (severity, rule) with the number of runs."""
    runs = healthy_runs(lines)
    kinds = [{(alarm[SEVERITY], alarm[RULE]) for alarm in line["alarms"]} for line in runs]
    fails = sum(any(severity == "fail" for severity, _ in found) for found in kinds)
    warned = sum(bool(found) for found in kinds) - fails
    return Health(len(runs), fails, warned, Counter(kind for found in kinds for kind in found))


def outlier_recall(found: Sequence[Verdict]) -> tuple[int, int]:
    """Return how many runs with an effect have a loss that is not finite, or an outlier of 6 σ, after the fault."""
    real = [v for v in found if v.effect]
    hits = [v for v in real if v.line["outlier"] is not None and v.line["outlier"] >= v.line["begins"]]
    return len(hits), len(real)


def detector_recall(found: Sequence[Verdict], name: str) -> tuple[int, int]:
    """Return how many runs with values that are not finite another detector found."""
    judged = [v for v in found if v.effect and "nonfinite" in v.fault.causes]
    return sum(v.line.get(name) is not None for v in judged), len(judged)
