"""The verdict: one sentence about a run, computed from its alarms."""

from __future__ import annotations

from typing import NamedTuple

from omninorm.report.story import Bad, RunStory, StoryAlarm
from omninorm.report.text import plain, plural

_BAD_VALUES = {"nan": "NaN", "inf": "infinity", "-inf": "negative infinity"}
_PHASES = {
    "forward": "the forward pass",
    "loss": "the loss",
    "backward": "the backward pass",
    "optimizer": "the optimizer's step",
}


class Verdict(NamedTuple):
    """What the page begins with.

    Args:
        status: "failing", "warnings", "healthy", or "unjudged": nothing was there to judge by.
        sentence: the verdict.
        more: what else there is to say, or "".
        remedy: what to try, or "".
        alarm: the alarm that it is about, if it is about one.
    """

    status: str
    sentence: str
    more: str = ""
    remedy: str = ""
    alarm: StoryAlarm | None = None


def judge(story: RunStory) -> Verdict:
    """The first failure is taken for the cause: what follows it is mostly its consequence."""
    fails = [alarm for alarm in story.alarms if alarm.severity == "fail"]
    warnings = [alarm for alarm in story.alarms if alarm.severity != "fail"]
    lead = _lead(fails)
    if story.bad and (lead is None or story.bad[0].step < lead.step):
        return Verdict("failing", f"Failing: {describe_bad(story.bad[0])}.", _further(story, None))
    if lead:
        return Verdict("failing", f"Failing: {_about(lead)}.", _further(story, lead), _advice(lead), lead)
    if story.ending.status == "diverged":
        sentence = f"Failing: the run diverged at step {story.ending.step:,}."
        return Verdict("failing", sentence, _further(story, None))
    if warnings:
        first = warnings[0]
        sentence = f"{plural(len(warnings), 'warning')}, no failure: {_about(first)}."
        return Verdict("warnings", sentence, _further(story, first), _advice(first), first)
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
    steps = plural(story.last_step - (story.watched.step if story.watched else 0), "step")
    stopped = f" {_stopped(story)}" if story.ending.status in ("error", "interrupted") else ""
    if story.watched is None:
        sentence = f"Not judged: {plural(story.last_step, 'step')} recorded without instruments."
        return Verdict("unjudged", sentence, stopped.strip(), "Run it under omninorm.watch to see inside.")
    if not story.samples:
        more = f"{steps} recorded, no sample taken yet.{stopped}"
        return Verdict("unjudged", "Not judged: the instruments have seen nothing yet.", more)
    return Verdict("healthy", f"Healthy: no alarm in {steps}.", stopped.strip())


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


def _about(alarm: StoryAlarm) -> str:
    """Layer, evidence and step; the evidence's own naming of either is not repeated."""
    evidence = plain(alarm.evidence).rstrip(". ") or plain(alarm.rule)
    layer = plain(alarm.layer, 200) if alarm.layer else ""
    where = f"{layer}: " if layer and layer not in evidence else ""
    when = "" if f"step {alarm.step}" in evidence else f" (step {alarm.step:,})"
    rank = f", rank {alarm.ranks[0]}" if 0 not in alarm.ranks else ""
    return f"{where}{evidence}{when}{rank}"


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
