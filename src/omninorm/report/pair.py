"""write_pair: one page that overlays two runs, and names the first step and layer at which they part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omninorm.record.signals import SIGNALS, STEP_SERIES
from omninorm.report.facts import facts, settings
from omninorm.report.labels import row_labels
from omninorm.report.packing import curve, pack
from omninorm.report.page import name_of, titled
from omninorm.report.panels import CURVES, MOST_EVALUATIONS, Panel, figure, missing_reason, title_of
from omninorm.report.parting import Difference, Parting, common_layers, common_steps, compare, values_at
from omninorm.report.reading import read_run
from omninorm.report.shell import document, write_document
from omninorm.report.story import RunStory, Series, Values, Watched
from omninorm.report.tables import grid
from omninorm.report.text import escape, plain, plural, short

MOST_ROWS = 20
"""Layers listed in the table of the first differing sample."""
_OWN = ("Started", "Ended", "Speed", "Last loss", "Last evaluation")  # differ between any two runs


def read_pair(first: str | Path, second: str | Path) -> tuple[RunStory, RunStory]:
    """Read two runs; of the second, the samples at the steps of the first one's.

    Raises:
        RunError: as `read_run`.
    """
    one = read_run(first)
    return one, read_run(second, like=one)


def write_pair(first: RunStory, second: RunStory, out: str | Path, found: Parting | None = None) -> Path:
    """Write the page of two runs that were read by `read_pair`; `found` is their comparison, if it is known."""
    return write_document(render_pair(first, second, found), out)


def render_pair(first: RunStory, second: RunStory, found: Parting | None = None) -> str:
    """Return the page as text. All text from the records is escaped."""
    found, names = found or compare(first, second), names_of(first, second)
    curves, maps = _curves(first, second, names), _maps(first, second)
    title, evidence = describe(found, names)
    kind = "healthy" if found.unequal is None else "quiet" if found.step is None else "warnings"
    main = (
        f'<section id="verdict" aria-label="Verdict"><div class="verdict {kind}"><span class="mark" aria-hidden="true">'
        f"{'=' if found.unequal is None else '≠'}</span><div><h1>{escape(title, 300)}</h1>"
        f"{''.join(f'<p>{escape(text)}</p>' for text in evidence)}</div></div></section>\n"
        f"{_layers(found, names)}{_settings(first, second, names)}"
        f"{_section('training', 'Training', curves, _key(names))}"
        f"{_section('maps', 'Differences by layer', maps, _maps_intro(names))}"
    )
    data = _data(first, second, found, [*curves, *maps])
    return document(f"{names[0]} and {names[1]}: {title}", f"{names[0]} and {names[1]}", main, data)


def names_of(first: RunStory, second: RunStory) -> tuple[str, str]:
    """Return two different names for the runs: their own, or else their paths."""
    names = plain(name_of(first), 60), plain(name_of(second), 60)
    if names[0] == names[1]:
        names = plain(first.source, 120), plain(second.source, 120)
    return names if names[0] != names[1] else (f"{names[0]} (first)", f"{names[1]} (second)")


def describe(found: Parting, names: tuple[str, str]) -> tuple[str, list[str]]:
    """Return a heading and sentences about where the runs part."""
    if not found.steps and not found.samples:
        return "The runs have no steps in common", []
    steps = plural(found.steps or found.samples, "recorded step" if found.steps else "sample")
    if found.unequal is None:
        return f"The runs are equal in all {steps}", []
    before = _before(found.unequal)
    if found.step is None:
        return f"The runs differ by no more than their noise in {steps}", [before]
    lead = found.lead
    assert lead is not None
    others = [each for each in (found.curve, *found.layers[:1]) if each and each is not lead]
    place = f" in {plain(lead.layer, 120)}" if lead.layer else ""
    missing = f" is missing in {names[lead.second is None]}" if lead.is_missing else ""
    title = f"The runs part at step {found.step:,}: {_title(lead.name)}{place}{missing}"
    return title, [*(f"{_named(each, names)}." for each in (lead, *others)), before]


def _before(first: Difference) -> str:
    return f"The first value that differs at all is at step {first.step:,}: {_where(first)}."


def _named(found: Difference, names: tuple[str, str]) -> str:
    second, first = ("missing" if value is None else short(value) for value in (found.second, found.first))
    text = f"{_where(found)} is {second} in {names[1]} and {first} in {names[0]}"
    return f"Step {found.step:,}: {text}"


def _where(found: Difference) -> str:
    return f"{_title(found.name)} in {plain(found.layer, 200)}" if found.layer else _title(found.name)


def _title(name: str) -> str:
    return CURVES[name][0].lower() if name in STEP_SERIES and name not in SIGNALS else SIGNALS[name].title


def _layers(found: Parting, names: tuple[str, str]) -> str:
    """Return the table of what differs in the first sample in which anything parts."""
    if not found.layers:
        return ""
    rows = [
        [title_of(each.name), each.layer or "whole run", short(each.first), short(each.second), short(each.excess, 3)]
        for each in found.layers[:MOST_ROWS]
    ]
    step, hidden = found.layers[0].step, len(found.layers) - MOST_ROWS
    caption = f"Sample of step {step:,}, the largest differences first" + (f"; {hidden:,} more" if hidden > 0 else "")
    table = grid("parting", caption, ["Signal", "Layer", *names, "Times the tolerance"], rows)
    return titled("parting", "Where the layers part", table)


def _settings(first: RunStory, second: RunStory, names: tuple[str, str]) -> str:
    """Return the table of facts and settings that differ."""
    one, two = ({**dict(facts(story)), **dict(settings(story.config))} for story in (first, second))
    keys = [key for key in {**one, **two} if one.get(key) != two.get(key) and key not in (*_OWN, "started")]
    rows = [[key, one.get(key, "–"), two.get(key, "–")] for key in keys]
    text = grid("settings", f"{plural(len(rows), 'different setting')}", ["Setting", *names], rows)
    calm = '<p class="calm">No recorded setting differs.</p>'
    return titled("settings", "What was set differently", text if rows else calm)


def _section(key: str, title: str, panels: Sequence[Panel], intro: str) -> str:
    if not panels:
        return ""
    return titled(key, title, f'{intro}<div class="panels">{"".join(panel.html for panel in panels)}</div>')


def _key(names: tuple[str, str]) -> str:
    return (
        f'<p class="intro"><span class="stroke first"></span> {escape(names[0])} '
        f'<span class="stroke second"></span> {escape(names[1])}</p>'
    )


def _maps_intro(names: tuple[str, str]) -> str:
    text = f"Red: larger in {names[1]}; blue: larger in {names[0]}. Grey: equal. At samples that both runs have."
    return f'<p class="intro">{escape(text)}</p>'


def _curves(first: RunStory, second: RunStory, names: tuple[str, str]) -> list[Panel]:
    """Return the panels of the curves that either run has."""
    panels = []
    for name, (title, formula, log) in CURVES.items():
        panels += _overlay(f"step-{name}", title, formula.format(unit=""), _both(first, second, name), log, names)
    panels += _overlay(
        "eval", "Evaluation", "bits per byte of held-out text", [first.evals, second.evals], False, names
    )
    for number, name in enumerate([*{**first.evaluations, **second.evaluations}][:MOST_EVALUATIONS]):
        pair = [story.evaluations.get(name, Series([], [])) for story in (first, second)]
        panels += _overlay(
            f"evaluation-{number}", f"Evaluation: {plain(name, 80)}", "each evaluation", pair, True, names
        )
    return panels


def _both(first: RunStory, second: RunStory, name: str) -> list[Series]:
    return [story.series.get(name, Series([], [])) for story in (first, second)]


def _overlay(
    name: str, title: str, formula: str, pair: Sequence[Series], log: bool, names: tuple[str, str]
) -> list[Panel]:
    known = [
        (series, called, place) for place, (series, called) in enumerate(zip(pair, names, strict=True)) if series.steps
    ]
    if not known:
        return []
    drawn = [
        curve(series, log) | {"name": called, "colour": ("accent", "other")[place]} for series, called, place in known
    ]
    # One scale for both: logarithmic only if both are.
    logarithmic = all(each["log"] for each in drawn)
    data = drawn[0] | {"log": logarithmic, "others": drawn[1:]}
    ends = "; ".join(
        f"{called}: {short(series.values[-1])} at step {series.steps[-1]:,}" for series, called, _ in known
    )
    return [Panel(name, figure(name, "line", title, formula, f"{title} of both runs. {ends}.", ""), data)]


def _maps(first: RunStory, second: RunStory) -> list[Panel]:
    """Return a map of the differences of each signal that both runs have."""
    steps = common_steps(first, second)
    panels = []
    for name, signal in SIGNALS.items():
        layers = common_layers(first, second, signal.axis)
        if signal.axis == "run" or not steps or not layers or any(missing_reason(s, name) for s in (first, second)):
            continue
        one, two = (values_at(story, name, steps, layers) for story in (first, second))
        rows = [
            [_change(a, b, signal.logarithmic) for a, b in zip(*pair, strict=True)]
            for pair in zip(one, two, strict=True)
        ]
        known = [abs(value) for row in rows for value in row if value is not None and math.isfinite(value)]
        if known:
            panels.append(_map(name, rows, max(known)))
    return panels


def _map(name: str, rows: list[Values], most: float) -> Panel:
    signal = SIGNALS[name]
    formula = "log₂ of the ratio: 1 means twice as large" if signal.logarithmic else "difference"
    data = {"axis": signal.axis, "log": False, "data": pack(rows), "difference": 0.1 if signal.logarithmic else 0.01}
    summary = f"{title_of(name)}: difference of the two runs by layer and sample, at most {short(most)}."
    html = figure(name, "map", title_of(name), f"{formula}; {signal.axis} × step", summary, "")
    return Panel(name, html, data)


def _change(one: float | None, two: float | None, logarithmic: bool) -> float | None:
    if one is None or two is None:
        return None
    if not (math.isfinite(one) and math.isfinite(two)):
        return 0.0 if one == two or (one != one and two != two) else math.nan
    if one == two:
        return 0.0
    if logarithmic:
        return math.log2(two / one) if one > 0 and two > 0 and 0 < two / one < math.inf else math.nan
    return two - one


def _data(first: RunStory, second: RunStory, found: Parting, figures: Sequence[Panel]) -> dict[str, Any]:
    steps = common_steps(first, second)
    axes = {axis: common_layers(first, second, axis) for axis in ("block", "norm", "group")}
    known = first.watched or Watched()
    series = [each for story in (first, second) for each in (*story.series.values(), story.evals) if each.steps]
    marks: list[Mapping[str, Any] | list[Any]] = []
    if found.step is not None:
        layer = found.layers[0].layer if found.layers else None
        marks = [[found.step, "warn", "parting", plain(layer, 120) if layer else None]]
    return {
        "first": min((each.steps[0] for each in series), default=0),
        "last": max(first.last_step, second.last_step),
        "steps": steps,
        "axes": {axis: [plain(name, 120) for name in names] for axis, names in axes.items()},
        "ticks": {axis: row_labels(known, axis, names) for axis, names in axes.items()},
        "figures": {panel.name: panel.data for panel in figures},
        "alarms": marks,
        "lead": 0 if marks else None,
    }
