"""write_report: one self-contained HTML page, generated from a run's record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omninorm.report import panels, tables
from omninorm.report.entries import alarm_entries
from omninorm.report.facts import facts, samples, settings
from omninorm.report.labels import row_labels
from omninorm.report.reading import read_run
from omninorm.report.shell import document, fill, write_document
from omninorm.report.story import RunStory
from omninorm.report.text import escape, plain
from omninorm.report.verdict import Verdict, judge

_MARKS = {"failing": "▲", "warnings": "○", "healthy": "✓", "quiet": "–", "unjudged": "–"}
_SECTIONS = {
    "training": "Training",
    "depth": "By depth",
    "norms": "Norms",
    "groups": "Weights and optimizer",
    "output": "Output and gradient noise",
}


def write_report(path: str | Path, out: str | Path) -> Path:
    """Read a run and write its page. An existing page is replaced atomically.

    Args:
        path: a run's folder, or its record.jsonl.
        out: the page's file.

    Raises:
        RunError: the record can't be read (see `read_run`), or the page can't be written.
    """
    return write_page(read_run(path), out)


def write_page(story: RunStory, out: str | Path, refresh: float | None = None) -> Path:
    """Write the page of a story that has been read before, as `write_report` does."""
    return write_document(render(story, refresh), out)


def render(story: RunStory, refresh: float | None = None) -> str:
    """Return the page as text. All text from the record is escaped.

    Args:
        story: the run.
        refresh: seconds after which a browser loads the page again, for a run that grows; None for never.
    """
    verdict = judge(story)
    groups = _panels(story)
    slots = {
        "verdict": _verdict(verdict),
        "facts": "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts(story)),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in story.notes),
        "settings": _settings(story),
        "alarms": _alarms(story, verdict),
        "panels": "".join(_section(story, key, found) for key, found in groups.items() if found),
        "tables": _by_layer(story),
        "unseen": _unseen(story),
    }
    data = _data(story, verdict, [panel for group in groups.values() for panel in group])
    return document(f"{name_of(story)}: {verdict.title}", name_of(story), fill("run.html", slots), data, refresh)


def _alarms(story: RunStory, verdict: Verdict) -> str:
    entries = alarm_entries(tables.shown_alarms(story), verdict.alarm)
    if not entries:
        return f'<p class="calm">{escape(_no_alarm(story))}</p>'
    return f'{entries}<div id="timeline"></div>{tables.alarm_table(story)}'


def _section(story: RunStory, key: str, found: Sequence[panels.Panel]) -> str:
    """Return a section of figures; sections without a figure are left out."""
    intro = f"Each row is a layer, the first at the top; each column is a sample. Samples: {samples(story)}."
    text = f'<p class="intro">{escape(intro)}</p>' if key == "depth" else ""
    return titled(key, _SECTIONS[key], f'{text}<div class="panels">{"".join(panel.html for panel in found)}</div>')


def titled(key: str, title: str, content: str) -> str:
    """Return a section with a heading."""
    return (
        f'<section aria-labelledby="{key}-title">\n<h2 id="{key}-title">{escape(title)}</h2>\n{content}\n</section>\n'
    )


def _by_layer(story: RunStory) -> str:
    found = tables.layer_table(story) + tables.norm_table(story)
    return titled("layers", "Values by layer", found) if found else ""


def _unseen(story: RunStory) -> str:
    found = tables.unseen_table(story)
    return titled("unseen", "Signals without values", found) if found else ""


def _panels(story: RunStory) -> dict[str, list[panels.Panel]]:
    return {
        "training": panels.training_panels(story),
        "depth": panels.signal_panels(story, panels.DEPTH),
        "norms": panels.signal_panels(story, panels.NORMS),
        "groups": panels.signal_panels(story, panels.GROUPS),
        "output": panels.signal_panels(story, [*panels.OUTPUT, *panels.others()]),
    }


def _data(story: RunStory, verdict: Verdict, figures: Sequence[panels.Panel]) -> dict[str, Any]:
    """Return the data that the script draws."""
    known = story.watched
    axes = {axis: known.names(axis) if known else [] for axis in ("block", "norm", "group")}
    alarms = tables.shown_alarms(story)
    return {
        # An evaluation may come before the first step.
        "first": min([story.first_step, *(s.steps[0] for s in (story.evals, *story.evaluations.values()) if s.steps)]),
        "last": story.last_step,
        "steps": [column.step for column in story.columns],
        "axes": {axis: [plain(name, 120) for name in names] for axis, names in axes.items()},
        "ticks": {axis: row_labels(known, axis) if known else [] for axis in axes},
        "figures": {panel.name: panel.data for panel in figures},
        "alarms": [
            [alarm.step, alarm.severity, plain(alarm.rule, 80), plain(alarm.layer, 120) if alarm.layer else None]
            for alarm in alarms
        ],
        "lead": alarms.index(verdict.alarm) if verdict.alarm in alarms else None,
    }


def _verdict(verdict: Verdict) -> str:
    evidence = f'<p class="evidence">{escape(verdict.evidence, 1200)}</p>' if verdict.evidence else ""
    remedy = f'<p class="remedy"><b>What to try</b> {escape(verdict.remedy)}</p>' if verdict.remedy else ""
    more = f'<p class="more">{escape(verdict.more, 1200)}</p>' if verdict.more else ""
    return (
        f'<div class="verdict {verdict.status}"><span class="mark" aria-hidden="true">{_MARKS[verdict.status]}</span>'
        f"<div><h1>{escape(verdict.title)}</h1>{evidence}{remedy}{more}</div></div>"
    )


def _settings(story: RunStory) -> str:
    items = settings(story.config)
    if not items:
        return ""
    return (
        f"<details><summary>All settings</summary>{tables.pairs('settings', 'config.json of the run', items)}</details>"
    )


def _no_alarm(story: RunStory) -> str:
    if story.watched is None:
        return "No alarm could be raised: the run was recorded without omninorm.watch."
    return "No alarm was raised."


def name_of(story: RunStory) -> str:
    """Return the run's name, or else that of its folder."""
    if story.watched and story.watched.name.strip():
        return story.watched.name
    source = story.source if story.source.suffix != ".jsonl" else story.source.parent
    return source.name or source.resolve().name
