"""The page's list of alarms: one entry per cause, with its layers and its consequences."""

from __future__ import annotations

from collections.abc import Sequence

from omninorm.report.causes import Cause, causes
from omninorm.report.story import StoryAlarm
from omninorm.report.text import escape, plain, plural

MARKS = {"fail": "▲", "warn": "○"}
WORDS = {"fail": "failure", "warn": "warning"}
MOST_LAYERS = 24
"""Layers that an entry names; the table of all alarms has the others."""


def alarm_entries(alarms: Sequence[StoryAlarm], quoted: StoryAlarm | None = None) -> str:
    """Return the list of causes, failures first; "" without alarms.

    Args:
        alarms: the alarms, by step.
        quoted: the alarm that the verdict quotes; its evidence and remedy are not repeated.
    """
    found = [_entry(cause, cause.lead is quoted) for cause in causes(alarms)]
    return f'<ol class="causes">{"".join(found)}</ol>' if found else ""


def badge(severity: str) -> str:
    """Return a severity's mark and word."""
    return f'<span class="badge {severity}">{MARKS[severity]} {WORDS[severity]}</span>'


def _entry(cause: Cause, quoted: bool) -> str:
    text = "" if quoted else _explanation(cause)
    follows = "".join(map(_consequence, cause.consequences))
    count = plural(len(cause.consequences), "probable consequence")
    nested = f'<p class="follows">{count}</p><ul class="consequences">{follows}</ul>' if follows else ""
    return (
        f'<li class="cause {cause.severity}"><h3>{badge(cause.severity)} {escape(cause.title, 200)}</h3>'
        f"{_when(cause)}{text}{_layers(cause)}{nested}</li>"
    )


def _consequence(cause: Cause) -> str:
    return (
        f'<li class="{cause.severity}"><details><summary>{badge(cause.severity)} {escape(cause.title, 200)}, '
        f"step {cause.first:,}</summary>{_when(cause)}{_explanation(cause)}{_layers(cause)}</details></li>"
    )


def _when(cause: Cause) -> str:
    number, first = cause.alarms[0]
    text = f"from step {cause.first:,}"
    if cause.last > cause.first:
        text += f", last raised at step {cause.last:,}"
    ranks = sorted({rank for _, alarm in cause.alarms for rank in alarm.ranks})
    text += f", ranks {', '.join(map(str, ranks))}" if ranks != [0] else ""
    button = f'<button type="button" class="show" data-alarm="{number}">{text}</button>'
    place = "" if any(alarm.layer for _, alarm in cause.alarms) else ", whole run"
    return f'<p class="when"><code>{escape(first.rule, 80)}</code> {button}{place}</p>'


def _explanation(cause: Cause) -> str:
    """Return the evidence, without what the heading says, and the remedy."""
    remedy = plain(cause.lead.remedy).removeprefix("try ")
    advice = f'<p class="remedy"><b>What to try</b> {escape(remedy)}</p>' if remedy else ""
    return f"<p>{escape(cause.evidence)}</p>{advice}"


def _layers(cause: Cause) -> str:
    found = cause.layers
    items = "".join(
        f'<li><button type="button" class="show" data-alarm="{number}">{escape(alarm.layer, 200)}</button>'
        f" <small>{MARKS[alarm.severity]} {alarm.step:,}</small></li>"
        for number, alarm in found[:MOST_LAYERS]
    )
    hidden = len(found) - MOST_LAYERS
    more = f"<li>and {hidden:,} more</li>" if hidden > 0 else ""
    name = plural(len(found), "layer") if len(found) != 1 else "Layer"
    return f'<div class="where"><b>{name}</b><ul>{items}{more}</ul></div>' if found else ""
