"""The verdict: one sentence about a run, from its alarms and its loss."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from omninorm.record.alarm import leading, roots
from omninorm.record.signals import SIGNALS
from omninorm.report.story import Bad, RunStory, StoryAlarm
from omninorm.report.text import plain, plural, short

_BAD_VALUES = {"nan": "NaN", "inf": "infinity", "-inf": "negative infinity"}
_PHASES = {
    "forward": "the forward pass",
    "loss": "the loss",
    "backward": "the backward pass",
    "optimizer": "the optimizer's step",
}
# Headings for rules whose names are not plain words joined by hyphens.
_RULES = {
    "adam-eps": "Adam's ε",
    "eps-share": "a norm's ε",
    "logz": "log Z",
    "nonfinite": "a non-finite value",
    "no-norm": "blocks without a norm",
    "post-norm-depth": "post-norm at this depth",
}
NAMED = 3
"""The number of unchecked signals that are listed by name."""
CAUSE = 60
"""Largest number of characters at the beginning of an alarm's evidence that become the heading."""
ENOUGH_STEPS, FEW_STEPS = 50, 10
"""Fewest losses for the status "healthy", and fewest losses that are mentioned at all."""
FALL = 0.01
"""The share by which the loss must have fallen for the status "healthy"."""


class Verdict(NamedTuple):
    """The beginning of the report page.

    Args:
        status: "failing", "warnings", "healthy" (no alarm and a falling loss), "quiet" (no alarm, but the loss did not
            fall), or "unjudged" (nothing was recorded to judge by).
        sentence: the whole verdict.
        more: further information, or "".
        remedy: what to try, or "".
        alarm: the alarm that the verdict is about, if any.
        title: the cause in a few words, for a heading.
        evidence: the rest of the sentence, or "".
    """

    status: str
    sentence: str
    more: str = ""
    remedy: str = ""
    alarm: StoryAlarm | None = None
    title: str = ""
    evidence: str = ""


def judge(story: RunStory) -> Verdict:
    """Return the verdict, about the leading alarm."""
    lead, fails = leading(story.alarms), story.count("fail")
    if story.bad and (lead is None or not fails or story.bad[0].step < lead.step):
        return _about_bad(story, story.bad[0])
    if lead and fails:
        return _about_alarm(story, lead, "failing", "Failing")
    if story.ending.status == "diverged":
        sentence = f"Failing: the run diverged at step {story.ending.step:,}."
        return Verdict("failing", sentence, _further(story, None), title=sentence[:-1])
    if lead:
        return _about_alarm(story, lead, "warnings", f"{plural(len(_independent(story)), 'warning')}, no failures")
    return _calm(story)


def explain(alarm: StoryAlarm, several: bool = False) -> tuple[str, str]:
    """Return an alarm's cause in a few words, and the rest of its evidence.

    Args:
        alarm: the alarm.
        several: whether the words are for several layers, and should not name the alarm's.
    """
    evidence = plain(alarm.evidence).rstrip(". ") or plain(alarm.rule)
    cause, rest = _cause(alarm, evidence)
    layer = plain(alarm.layer, 200) if alarm.layer else ""
    if several and layer and (rest == evidence or layer in cause):
        cause = _RULES.get(alarm.rule) or plain(alarm.rule, 80).replace("-", " ")
        rest = evidence
    return _capital(cause), f"{_capital(rest)}."


def describe_bad(bad: Bad) -> str:
    """Return a clause such as "the first NaN appeared in blocks.3.attention, in the forward pass of step 12"."""
    value = _BAD_VALUES.get(bad.value, plain(bad.value, 20))
    phase = _PHASES.get(bad.phase, plain(bad.phase, 40))
    place = phase if bad.layer is None or bad.phase == "loss" else f"{plain(bad.layer, 200)}, in {phase}"
    since = f", after a finite output of {plain(bad.after, 200)}" if bad.after else ""
    rank = f" on rank {bad.rank}" if bad.rank else ""
    return f"the first {value} appeared in {place} of step {bad.step:,}{since}{rank}"


def describe_end(story: RunStory) -> str:
    """Return how the run ended, in a few words."""
    ending = story.ending
    at = f" at step {ending.step:,}" if ending.step is not None else ""
    words = {
        "finished": f"finished{at}",
        "diverged": f"diverged{at}: the loss, a gradient or the weights became non-finite",
        "interrupted": f"interrupted{at}",
        "done": f"ended normally{at}",
        "error": f"stopped by an error{at}",
        "open": "no end recorded: still running, or killed",
    }[ending.status]
    return f"{words}: {plain(ending.reason)}" if ending.reason else words


def _calm(story: RunStory) -> Verdict:
    # Steps that were recorded before a resume are not counted.
    before = min(story.watched.step if story.watched else 0, max(0, story.first_step - 1))
    steps = plural(story.last_step - before, "step")
    stopped = f" {_stopped(story)}" if story.ending.status in ("error", "interrupted") else ""
    if story.watched is None:
        sentence = f"Not monitored: {plural(story.last_step, 'step')} recorded without omninorm.watch."
        remedy = "Train with omninorm.watch to record signals and alarms."
        return Verdict("unjudged", sentence, stopped.strip(), remedy, title=sentence[:-1])
    if not story.samples:
        more = f"{steps} recorded.{stopped}"
        sentence = "No verdict yet: no sample has been taken."
        return Verdict("unjudged", sentence, more, title=sentence[:-1])
    fell, text = _loss(story)
    title = f"No alarm in {steps}"
    more = f"{_coverage(story)}{stopped}"
    if fell:
        sentence = f"{title}; {text}."
        return Verdict("healthy", sentence, more, title=title, evidence=f"{_capital(text)}.")
    return Verdict("quiet", f"{title}. {text}".strip(), more, title=title, evidence=text)


def _coverage(story: RunStory) -> str:
    """Return what was checked, and which signals could not be: the absence of an alarm says nothing about those."""
    missing = [signal.title for name, signal in SIGNALS.items() if name in story.not_seen]
    checked = f"{len(SIGNALS) - len(missing)} of {len(SIGNALS)} signals" if missing else f"all {len(SIGNALS)} signals"
    text = f"Checked: {checked} in {plural(story.samples, 'sample')}."
    if not missing:
        return text
    others = len(missing) - NAMED
    return f"{text} Not checked: {', '.join(missing[:NAMED])}{f' and {others} more' if others > 0 else ''}."


def _loss(story: RunStory) -> tuple[bool, str]:
    """Return whether the loss fell, from the means of its first and last tenth, and a text about it."""
    values = story.series["loss"].values if "loss" in story.series else []
    tenth = len(values) // 10
    if len(values) < FEW_STEPS:
        return False, ""
    first, last = _mean(values[:tenth]), _mean(values[-tenth:])
    smoothed = f"means of the first and last {tenth:,} steps" if tenth > 1 else "first and last step"
    limits = f"{short(first)} initially, {short(last)} at the end ({smoothed})."
    if first - last >= FALL * abs(first):
        text = f"the loss fell from {short(first)} to {short(last)} ({smoothed})"
        # A few steps are not enough for the status "healthy", but the text mentions them.
        return (True, text) if len(values) >= ENOUGH_STEPS else (False, f"{_capital(text)}.")
    return False, f"The loss has {'barely' if last < first else 'not'} fallen: {limits}"


def _mean(values: list[float]) -> float:
    """Return the mean of the finite values; NaN if there is none. Dividing first keeps the sum from overflowing."""
    known = [value for value in values if math.isfinite(value)]
    return sum(value / len(known) for value in known) if known else math.nan


def _stopped(story: RunStory) -> str:
    was = "" if story.ending.status == "diverged" else "was "
    return f"The run {was}{describe_end(story)}."


def _advice(alarm: StoryAlarm) -> str:
    """Return the remedy, to follow "What to try"."""
    return plain(alarm.remedy).removeprefix("try ")


def _about_bad(story: RunStory, bad: Bad) -> Verdict:
    text = describe_bad(bad)
    value, place = _BAD_VALUES.get(bad.value, plain(bad.value, 20)), _PHASES.get(bad.phase, plain(bad.phase, 40))
    place = place if bad.layer is None or bad.phase == "loss" else plain(bad.layer, 200)
    title = f"Failing: {'a ' if value == 'NaN' else ''}{value} in {place}"
    return Verdict("failing", f"Failing: {text}.", _further(story, None), title=title, evidence=f"{_capital(text)}.")


def _about_alarm(story: RunStory, alarm: StoryAlarm, status: str, begin: str) -> Verdict:
    evidence = plain(alarm.evidence).rstrip(". ") or plain(alarm.rule)
    sentence = f"{begin}: {_placed(alarm, evidence, '')}."
    cause, rest = _cause(alarm, evidence)
    title, detail = f"{begin}: {cause}", f"{_capital(_placed(alarm, rest, cause))}."
    return Verdict(status, sentence, _further(story, alarm), _advice(alarm), alarm, title, detail)


def _cause(alarm: StoryAlarm, evidence: str) -> tuple[str, str]:
    """Split the evidence into a heading and the rest: at its colon, or else use the rule and the layer as heading."""
    cause, colon, rest = evidence.partition(": ")
    layer = plain(alarm.layer, 200) if alarm.layer else ""
    if colon and rest and len(cause) <= CAUSE and cause != layer:
        return cause, rest
    rule = _RULES.get(alarm.rule) or plain(alarm.rule, 80).replace("-", " ")
    return f"{rule} in {layer}" if layer else rule, evidence


def _placed(alarm: StoryAlarm, evidence: str, cause: str) -> str:
    """Return layer, evidence and step, leaving out what the evidence or the cause already mentions."""
    text = f"{cause} {evidence}"
    layer = plain(alarm.layer, 200) if alarm.layer else ""
    where = f"{layer}: " if layer and layer not in text else ""
    when = "" if f"step {alarm.step}" in text else f" (step {alarm.step:,})"
    rank = f", rank {alarm.ranks[0]}" if 0 not in alarm.ranks else ""
    return f"{where}{evidence}{when}{rank}"


def _capital(text: str) -> str:
    """Capitalize the beginning of a sentence, unless it is the name of a layer."""
    return text[0].upper() + text[1:] if re.match(r"[a-z]+[ ,]", text) else text


def _independent(story: RunStory) -> list[StoryAlarm]:
    """Return the alarms that follow from no other alarm."""
    return [alarm for alarm, root in zip(story.alarms, roots(story.alarms), strict=True) if root is alarm]


def _further(story: RunStory, lead: StoryAlarm | None) -> str:
    """Summarize the other alarms that follow from no other one, and how the run ended."""
    severities = [alarm.severity for alarm in _independent(story) if alarm is not lead]
    counted = [(severities.count("fail"), "failure"), (severities.count("warn"), "warning")]
    parts = [plural(number, f"{'further ' if lead else ''}{noun}") for number, noun in counted if number]
    sentences = [f"{' and '.join(parts)} in {plural(story.last_step, 'step')}."] if parts else []
    if story.bad and lead and lead.rule != "nonfinite":
        sentences.append(f"T{describe_bad(story.bad[0])[1:]}.")
    if story.ending.status in ("diverged", "error", "interrupted"):
        sentences.append(_stopped(story))
    return " ".join(sentences)
