"""The page's tables. They are complete without the script, which only makes them sortable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from omninorm.record.signals import SIGNALS
from omninorm.report.entries import badge
from omninorm.report.panels import missing_reason, missing_series, title_of
from omninorm.report.story import RunStory, StoryAlarm
from omninorm.report.text import escape, plain, plural, short

MAX_ROWS = 400
FEW_ALARMS = 8
"""Up to this many alarms are shown without a scroll bar."""


def shown_alarms(story: RunStory) -> list[StoryAlarm]:
    """Return the alarms that the page lists, by step: all of them, or the first 400 with failures preferred."""
    if len(story.alarms) <= MAX_ROWS:
        return list(story.alarms)
    ranked = sorted(story.alarms, key=lambda alarm: (alarm.severity != "fail", alarm.step))
    return sorted(ranked[:MAX_ROWS], key=lambda alarm: alarm.step)


def alarm_table(story: RunStory) -> str:
    """Return the table of alarms: step, severity, rule, layer, evidence, remedy and source."""
    alarms = shown_alarms(story)
    if not alarms:
        return ""
    several = any(alarm.ranks != (0,) for alarm in alarms)
    heads = ["Step", "Severity", "Rule", "Layer", *(["Rank"] if several else []), "Evidence"]
    rows = "".join(_alarm_row(number, alarm, several) for number, alarm in enumerate(alarms))
    hidden = len(story.alarms) - len(alarms)
    caption = f"{plural(len(story.alarms), 'alarm')}, by step"
    caption += f"; {hidden:,} of them are not listed" if hidden else ""
    table = _table("alarms", caption, heads, rows, "scroll" if len(alarms) > FEW_ALARMS else "scroll whole")
    return f"<details><summary>All alarms by step, with their sources</summary>{table}</details>"


def _alarm_row(number: int, alarm: StoryAlarm, several: bool) -> str:
    ranks = ", ".join(map(str, alarm.ranks))
    cells = [
        _cell(badge(alarm.severity), alarm.severity),
        _cell(f"<code>{escape(alarm.rule, 80)}</code>"),
        _cell(f"<code>{escape(alarm.layer, 200)}</code>" if alarm.layer else "whole run"),
        *([_cell(escape(ranks, 80))] if several else []),
        _cell(_details(alarm)),
    ]
    show = f'<button type="button" class="show" data-alarm="{number}">{alarm.step:,}</button>'
    return f'<tr id="alarm-{number}"><th scope="row" data-value="{alarm.step}">{show}</th>{"".join(cells)}</tr>'


def _details(alarm: StoryAlarm) -> str:
    remedy = plain(alarm.remedy).removeprefix("try ")
    parts = [
        f"<p>{escape(alarm.linked_evidence)}</p>",
        f'<p class="remedy"><b>What to try</b> {escape(remedy)}</p>' if remedy else "",
        f'<p class="source">Source: {escape(alarm.source)}</p>' if alarm.source else "",
    ]
    return "".join(parts)


def layer_table(story: RunStory) -> str:
    """Return the table of the latest values of blocks and other groups of parameters."""
    known = story.watched
    if known is None or not story.columns:
        return ""
    names = list(dict.fromkeys([*known.blocks, *known.groups]))
    return _newest(story, "layers", "Blocks and other parts", names, ("block", "group"))


def norm_table(story: RunStory) -> str:
    """Return the table of the latest values of norms."""
    known = story.watched
    if known is None or not story.columns or not known.norms:
        return ""
    return _newest(story, "norms", "Norms", known.names("norm"), ("norm",))


def _newest(story: RunStory, key: str, what: str, names: list[str], axes: Sequence[str]) -> str:
    assert story.watched is not None
    newest = story.columns[-1]
    signals = [name for name, signal in SIGNALS.items() if signal.axis in axes and name in newest.signals]
    signals = [name for name in signals if any(value is not None for value in newest.signals[name])]
    by_name: Mapping[str, dict[str, float | None]] = {
        name: dict(zip(story.watched.names(SIGNALS[name].axis), newest.signals[name], strict=True)) for name in signals
    }
    worst = dict(zip(story.watched.groups, story.worst.get("adam_ratio", ()), strict=False)) if "group" in axes else {}
    worst = {name: tensor for name, tensor in worst.items() if isinstance(tensor, str)}
    rows = []
    for place, name in enumerate(names[:MAX_ROWS]):
        cells = [_number(by_name[signal].get(name)) for signal in signals]
        cells += [_cell(f"<code>{escape(worst[name], 120)}</code>" if name in worst else "–")] if worst else []
        row = f'<tr><th scope="row" data-value="{place}"><code>{escape(name, 120)}</code></th>{"".join(cells)}</tr>'
        rows.append(row)
    cut = f"; first {MAX_ROWS} of {len(names):,}" if len(names) > MAX_ROWS else ""
    heads = ["Name", *(title_of(signal) for signal in signals), *(["Worst tensor for Adam"] if worst else [])]
    return _table(key, f"{what} at step {newest.step:,} (latest sample){cut}", heads, "".join(rows))


def unseen_table(story: RunStory) -> str:
    """Return the table of signals without a value, with the reasons."""
    missing = [(title, name, formula, reason) for name, title, formula, reason in missing_series(story)]
    for name, signal in SIGNALS.items():
        if reason := missing_reason(story, name):
            missing.append((title_of(name), name, signal.formula, reason))
    rows = [
        f'<tr><th scope="row">{escape(title)}</th>{_cell(f"<code>{name}</code>")}'
        f"{_cell(escape(formula))}{_cell(escape(reason))}</tr>"
        for title, name, formula, reason in missing
    ]
    caption = f"{plural(len(rows), 'signal')} without a value in this record"
    return (
        _table("unseen", caption, ["Signal", "Name in the record", "Formula", "Reason"], "".join(rows)) if rows else ""
    )


def pairs(key: str, caption: str, items: Iterable[tuple[str, str]]) -> str:
    """Return a table of settings and values."""
    rows = "".join(f'<tr><th scope="row">{escape(name, 80)}</th>{_cell(escape(text))}</tr>' for name, text in items)
    return _table(key, caption, ["Setting", "Value"], rows)


def grid(key: str, caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts; the first of each row is its heading."""
    lines = (
        f'<tr><th scope="row">{escape(first, 120)}</th>{"".join(_cell(escape(text)) for text in rest)}</tr>'
        for first, *rest in rows
    )
    return _table(key, caption, heads, "".join(lines))


def _number(value: float | None) -> str:
    if value is None:
        return '<td class="number">–</td>'
    key = f"{value:.6g}" if math.isfinite(value) else "1e999" if value > 0 or math.isnan(value) else "-1e999"
    bad = "" if math.isfinite(value) else " bad"
    return f'<td class="number{bad}" data-value="{key}">{short(value)}</td>'


def _cell(content: str, value: str | None = None) -> str:
    return f'<td data-value="{value}">{content}</td>' if value else f"<td>{content}</td>"


def _table(key: str, caption: str, heads: Sequence[str], rows: str, kind: str = "scroll") -> str:
    columns = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{escape(caption)}"><table id="table-{key}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
