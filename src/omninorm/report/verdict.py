"""The verdict: one sentence about a run, computed from its alarms and its loss."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from omninorm.report.story import Bad, RunStory, StoryAlarm
from omninorm.report.text import plain, plural, short

_BAD_VALUES = {"nan": "NaN", "inf": "infinity", "-inf": "negative infinity"}
_PHASES = {
    "forward": "the forward pass",
    "loss": "the loss",
    "backward": "the backward pass",
    "optimizer": "the optimizer's step",
}
# Rules whose names are no words with hyphens between them.
_RULES = {
    "adam-eps": "Adam's ε",
    "eps-share": "a norm's ε",
    "logz": "log Z",
    "nonfinite": "a value that is not finite",
    "no-norm": "blocks without a norm",
    "post-norm-depth": "post-norm at this depth",
}
CAUSE = 60
"""The most characters of an evidence's beginning that are taken for a heading."""
ENOUGH_STEPS, FEW_STEPS = 50, 10
"""Losses below which nothing is called healthy, and below which nothing is said of them."""
FALL = 0.01
"""The part of the loss that a run must lose to be called healthy."""


class Verdict(NamedTuple):
    """What the page begins with.

    Args:
        status: "failing", "warnings", "healthy", "quiet" (no alarm, but no falling loss either), or "unjudged":
            nothing was there to judge by.
        sentence: the verdict, whole.
        more: what else there is to say, or "".
        remedy: what to try, or "".
        alarm: the alarm that it is about, if it is about one.
        title: the sentence's cause in a few words, for a heading.
        evidence: what the sentence says beyond its title, or "".
    """

    status: str
    sentence: str
    more: str = ""
    remedy: str = ""
    alarm: StoryAlarm | None = None
    title: str = ""
    evidence: str = ""


def judge(story: RunStory) -> Verdict:
    """The first failure is taken for the cause: what follows it is mostly its consequence."""
    fails = [alarm for alarm in story.alarms if alarm.severity == "fail"]
    warnings = [alarm for alarm in story.alarms if alarm.severity != "fail"]
    lead = _lead(fails)
    if story.bad and (lead is None or story.bad[0].step < lead.step):
        return _about_bad(story, story.bad[0])
    if lead:
        return _about_alarm(story, lead, "failing", "Failing")
    if story.ending.status == "diverged":
        sentence = f"Failing: the run diverged at step {story.ending.step:,}."
        return Verdict("failing", sentence, _further(story, None), title=sentence[:-1])
    if warnings:
        return _about_alarm(story, warnings[0], "warnings", f"{plural(len(warnings), 'warning')}, no failure")
    return _calm(story)


def describe_bad(bad: Bad) -> str:
    """ "the first NaN appeared in blocks.3.attention in the forward pass of step 12"."""
    value = _BAD_VALUES.get(bad.value, plain(bad.value, 20))
    phase = _PHASES.get(bad.phase, plain(bad.phase, 40))
    place = phase if bad.layer is None or bad.phase == "loss" else f"{plain(bad.layer, 200)}, in {phase}"
    rank = f" on rank {bad.rank}" if bad.rank else ""
    return f"the first {value} appeared in {place} of step {bad.step:,}{rank}"


def describe_end(story: RunStory) -> str:
    """How the run ended, in a few words."""
    ending = story.ending
    at = f" at step {ending.step:,}" if ending.step is not None else ""
    words = {
        "finished": f"finished{at}",
        "diverged": f"diverged{at}: the loss, a gradient or the weights were not finite",
        "interrupted": f"interrupted{at}",
        "done": f"ended normally{at}",
        "error": f"stopped by an error{at}",
        "open": "no end was recorded: it still runs, or was killed",
    }[ending.status]
    return f"{words}: {plain(ending.reason)}" if ending.reason else words


def _calm(story: RunStory) -> Verdict:
    # A resumed run was watched before as well.
    before = min(story.watched.step if story.watched else 0, max(0, story.first_step - 1))
    steps = plural(story.last_step - before, "step")
    stopped = f" {_stopped(story)}" if story.ending.status in ("error", "interrupted") else ""
    if story.watched is None:
        sentence = f"Not judged: {plural(story.last_step, 'step')} recorded without instruments."
        remedy = "Run it under omninorm.watch to see inside."
        return Verdict("unjudged", sentence, stopped.strip(), remedy, title=sentence[:-1])
    if not story.samples:
        more = f"{steps} recorded, no sample taken yet.{stopped}"
        sentence = "Not judged: the instruments have seen nothing yet."
        return Verdict("unjudged", sentence, more, title=sentence[:-1])
    fell, told = _loss(story)
    if fell:
        title, sentence = f"Healthy: no alarm in {steps}", f"Healthy: no alarm in {steps}, {told}."
        return Verdict("healthy", sentence, stopped.strip(), title=title, evidence=f"{_capital(told)}.")
    title = f"No alarm in {steps}"
    return Verdict("quiet", f"{title}. {told}".strip(), stopped.strip(), title=title, evidence=told)


def _loss(story: RunStory) -> tuple[bool, str]:
    """Whether the loss fell, by the means of its first and last tenth, and what to say of it."""
    values = story.series["loss"].values if "loss" in story.series else []
    tenth = len(values) // 10
    if len(values) < FEW_STEPS:
        return False, ""
    first, last = _mean(values[:tenth]), _mean(values[-tenth:])
    limits = f"{short(first)} at first, {short(last)} at the end."
    if first - last >= FALL * abs(first):
        told = f"the loss fell from {short(first)} to {short(last)}"
        # What few steps did is no reason to call a run healthy, but may be told.
        return (True, told) if len(values) >= ENOUGH_STEPS else (False, f"{_capital(told)}.")
    return False, f"The loss has {'hardly' if last < first else 'not'} fallen: {limits}"


def _mean(values: list[float]) -> float:
    """Of those that are finite; NaN where none is. Each is divided before, so that no sum overflows."""
    known = [value for value in values if math.isfinite(value)]
    return sum(value / len(known) for value in known) if known else math.nan


def _stopped(story: RunStory) -> str:
    was = "" if story.ending.status == "diverged" else "was "
    return f"The run {was}{describe_end(story)}."


def _advice(alarm: StoryAlarm) -> str:
    """The remedy, to stand after "What to try"."""
    return plain(alarm.remedy).removeprefix("try ")


def _lead(alarms: list[StoryAlarm]) -> StoryAlarm | None:
    """Of the earliest alarms one that names a layer, if there is one."""
    earliest = [alarm for alarm in alarms if alarm.step == alarms[0].step]
    return next((alarm for alarm in earliest if alarm.layer), earliest[0] if earliest else None)


def _about_bad(story: RunStory, bad: Bad) -> Verdict:
    told = describe_bad(bad)
    value, place = _BAD_VALUES.get(bad.value, plain(bad.value, 20)), _PHASES.get(bad.phase, plain(bad.phase, 40))
    place = place if bad.layer is None or bad.phase == "loss" else plain(bad.layer, 200)
    title = f"Failing: {'a ' if value == 'NaN' else ''}{value} in {place}"
    return Verdict("failing", f"Failing: {told}.", _further(story, None), title=title, evidence=f"{_capital(told)}.")


def _about_alarm(story: RunStory, alarm: StoryAlarm, status: str, begin: str) -> Verdict:
    evidence = plain(alarm.evidence).rstrip(". ") or plain(alarm.rule)
    sentence = f"{begin}: {_placed(alarm, evidence, '')}."
    cause, rest = _cause(alarm, evidence)
    title, detail = f"{begin}: {cause}", f"{_capital(_placed(alarm, rest, cause))}."
    return Verdict(status, sentence, _further(story, alarm), _advice(alarm), alarm, title, detail)


def _cause(alarm: StoryAlarm, evidence: str) -> tuple[str, str]:
    """A few words for a heading, and the rest: what stands before the evidence's colon, or else the rule and layer."""
    cause, colon, rest = evidence.partition(": ")
    layer = plain(alarm.layer, 200) if alarm.layer else ""
    if colon and rest and len(cause) <= CAUSE and cause != layer:
        return cause, rest
    rule = _RULES.get(alarm.rule) or plain(alarm.rule, 80).replace("-", " ")
    return f"{rule} in {layer}" if layer else rule, evidence


def _placed(alarm: StoryAlarm, evidence: str, cause: str) -> str:
    """Layer, evidence and step; where the evidence or the cause names either already, it is not repeated."""
    said = f"{cause} {evidence}"
    layer = plain(alarm.layer, 200) if alarm.layer else ""
    where = f"{layer}: " if layer and layer not in said else ""
    when = "" if f"step {alarm.step}" in said else f" (step {alarm.step:,})"
    rank = f", rank {alarm.ranks[0]}" if 0 not in alarm.ranks else ""
    return f"{where}{evidence}{when}{rank}"


def _capital(told: str) -> str:
    """A sentence's beginning; the name of a layer keeps its letters."""
    return told[0].upper() + told[1:] if re.match(r"[a-z]+[ ,]", told) else told


def _further(story: RunStory, lead: StoryAlarm | None) -> str:
    """What other alarms there are, and how the run went on."""
    fails = story.count("fail") - (lead is not None and lead.severity == "fail")
    warnings = story.count("warn") - (lead is not None and lead.severity != "fail")
    counted = [(fails, "failure"), (warnings, "warning")]
    parts = [plural(number, f"{'further ' if lead else ''}{noun}") for number, noun in counted if number]
    said = [f"{' and '.join(parts)} in {plural(story.last_step, 'step')}."] if parts else []
    if story.bad and lead:
        said.append(f"T{describe_bad(story.bad[0])[1:]}.")
    if story.ending.status in ("diverged", "error", "interrupted"):
        said.append(_stopped(story))
    return " ".join(said)
