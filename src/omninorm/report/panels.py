"""The page's figures, with text alternatives, and the reasons for missing ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from omninorm.record.signals import SIGNALS, Limit
from omninorm.report.facts import loss_unit
from omninorm.report.packing import curve, pack
from omninorm.report.story import RunStory, Series, Values
from omninorm.report.text import escape, plain, plural, short
from omninorm.report.values import LARGEST

_AXIS_NAMES = {"block": "block", "norm": "norm", "group": "group"}
# The signals of each section, in the order of the page.
DEPTH = (
    "stream_rms", "stream_grad", "grad_norm", "branch_ratio", "attention_ratio", "feed_forward_ratio",
    "angle", "stream_max", "stream_median", "attention_logit", "attention_entropy", "dead_units",
    "expert_load", "expert_least",
)  # fmt: skip
NORMS = ("norm_rms", "eps_share", "gain_max", "gain_ratio", "gain_small", "mean_share", "saturation")
GROUPS = ("weight_rms", "update_ratio", "adam_ratio", "adam_eps_ratio")
OUTPUT = ("logz", "logz_mean", "noise_scale")
CURVES = {
    "loss": ("Loss", "{unit}every step", True),
    "grad_norm": ("Gradient norm", "‖∂loss/∂w‖ of all parameters, before clipping, every step", True),
    "lr": ("Learning rate", "largest among the optimizer's parameter groups", False),
}


_NOT_RECORDED = {
    "loss": "No loss was recorded. Pass it to w.step(loss).",
    "grad_norm": "No gradient norm was recorded.",
    "lr": "No learning rate was recorded. Pass the optimizer: omninorm.watch(model, optimizer).",
}
_NO_EVALUATION = "No evaluation data. Pass held-out losses to w.log_eval(loss)."
MOST_EVALUATIONS = 20
"""Named evaluations that are drawn."""


class Panel(NamedTuple):
    """A figure: its HTML and the data that the script draws."""

    name: str
    html: str
    data: dict[str, Any]


def training_panels(story: RunStory) -> list[Panel]:
    """Return the panels of loss, gradient norm, learning rate and evaluations, as far as they were recorded."""
    unit = loss_unit(story)
    panels = [
        _line(
            f"step-{name}",
            title,
            formula.format(unit=f"{unit}, " if unit else ""),
            story.series.get(name, Series([], [])),
            log,
            _band(story, name),
        )
        for name, (title, formula, log) in CURVES.items()
    ]
    panels.append(_line("eval", "Evaluation", "bits per byte of held-out text", story.evals, False))
    for number, (name, series) in enumerate(list(story.evaluations.items())[:MOST_EVALUATIONS]):
        title = f"Evaluation: {plain(name, 80)}"
        panels.append(_line(f"evaluation-{number}", title, "held-out loss", series, False))
    return [panel for panel in panels if panel]


def missing_series(story: RunStory) -> list[tuple[str, str, str, str]]:
    """Return title, name, formula and reason of each curve of the training that was not recorded."""
    missing = [
        (title, name, formula.format(unit=""), _NOT_RECORDED[name])
        for name, (title, formula, _) in CURVES.items()
        if not story.series.get(name, Series([], [])).steps
    ]
    evaluated = story.evals.steps or story.evaluations
    return missing if evaluated else [*missing, ("Evaluation", "eval", "loss on held-out data", _NO_EVALUATION)]


def signal_panels(story: RunStory, names: Sequence[str]) -> list[Panel]:
    """Return a panel for each signal that has values: a curve for the axis "run", a map of layer × step for others."""
    known = [name for name in names if missing_reason(story, name) is None]
    panels = [(_run_signal if SIGNALS[name].axis == "run" else _map)(story, name) for name in known]
    return [panel for panel in panels if panel]


def limits_of(story: RunStory, name: str) -> list[Limit]:
    """Return the limits of the rules on a signal that were active in this run."""
    limits = story.watched.limits if story.watched else ()
    return [each for each in limits if each.signal == name and each.dtype in ("", story.dtype)]


def limit_text(limit: Limit) -> str:
    """Return a limit in words, such as "attention-logits: warning above 1,000, failure above 10,000"."""
    side = "below" if limit.below else "above"
    values = [("warning", limit.warn), ("failure", limit.fail)]
    parts = [f"{word} {side} {short(value)}" for word, value in values if value is not None]
    condition = f" ({plain(limit.condition, 120)})" if limit.condition else ""
    return f"{plain(limit.rule, 80)}: {', '.join(parts)}{condition}"


def others() -> list[str]:
    """Return the signals that the lists above do not contain."""
    return [name for name in SIGNALS if name not in {*DEPTH, *NORMS, *GROUPS, *OUTPUT}]


def missing_reason(story: RunStory, name: str) -> str | None:
    """Return why a signal has no value in this record; None if it has one."""
    rows = [column.signals[name] for column in story.columns if name in column.signals]
    if any(value is not None for row in reversed(rows) for value in row):
        return None
    if story.watched is None:
        return "The run was recorded without omninorm.watch."
    if reason := story.not_seen.get(name):
        return f"{reason[0].upper()}{reason[1:].rstrip('.')}."
    if not story.columns:
        return "No sample was taken."
    if rows:
        return "The signal was sampled but never had a value."
    return "The record does not contain this signal."


def title_of(name: str) -> str:
    """Return a signal's title as a heading; Greek letters are not capitalized."""
    title = SIGNALS[name].title
    return title[0].upper() + title[1:] if title[0].isascii() else title


def _run_signal(story: RunStory, name: str) -> Panel | None:
    found = [(c.step, c.signals[name][0]) for c in story.columns if c.signals.get(name)]
    known = [(step, value) for step, value in found if value is not None]
    series = Series([step for step, _ in known], [value for _, value in known])
    signal = SIGNALS[name]
    band = _band(story, name)
    return _line(f"signal-{name}", title_of(name), signal.formula, series, signal.logarithmic, band)


def _band(story: RunStory, name: str) -> list[list[float | None]]:
    """Return [step, lowest, highest ordinary value] at each sample, None where there is no such limit."""
    pairs = [(column.step, column.bounds[name]) for column in story.columns if name in column.bounds]
    return [
        [step, *(value if value is not None and abs(value) <= LARGEST else None for value in two)]
        for step, two in pairs
    ]


def _line(
    name: str, title: str, formula: str, series: Series, log: bool, band: list[list[float | None]] | None = None
) -> Panel | None:
    """Return a curve's panel; None without values."""
    if not series.steps:
        return None
    note = "Shaded: the ordinary range at that step, beyond which a rule looks closer." if band else ""
    data = curve(series, log) | ({"band": band} if band else {})
    return Panel(name, figure(name, "line", title, formula, _line_summary(title, series), note), data)


def _line_summary(title: str, series: Series) -> str:
    steps, values = series
    low, high, bad = _limits([values])  # type: ignore[list-item]
    text = f"{title}: {short(values[0])} at step {steps[0]:,}, {short(values[-1])} at step {steps[-1]:,}."
    if low <= high:
        lowest, highest = steps[values.index(low)], steps[values.index(high)]
        text += f" Lowest {short(low)} at step {lowest:,}, highest {short(high)} at step {highest:,}."
    return f"{text} Not finite at {plural(bad, 'step')}." if bad else text


def _map(story: RunStory, name: str) -> Panel:
    signal = SIGNALS[name]
    formula = f"{signal.formula}; {_AXIS_NAMES[signal.axis]} × step"
    names = story.watched.names(signal.axis) if story.watched else []
    nothing: list[float | None] = [None] * len(names)
    rows = [column.signals.get(name, nothing) for column in story.columns]
    limits = limits_of(story, name)
    data: dict[str, Any] = {"axis": signal.axis, "log": signal.logarithmic, "data": pack(rows)}
    data |= {"limits": [[each.warn, each.fail, each.below, bool(each.condition)] for each in limits]} if limits else {}
    data |= {"scale": signal.scale} if signal.scale else {}
    note = f"{'; '.join(map(limit_text, limits))}." if limits else ""
    return Panel(name, figure(name, "map", title_of(name), formula, _map_summary(story, name, names, rows), note), data)


def _map_summary(story: RunStory, name: str, names: list[str], rows: Sequence[list[float | None]]) -> str:
    low, high, bad = _limits(rows)
    kind = _AXIS_NAMES[SIGNALS[name].axis]
    text = f"{title_of(name)}: {plural(len(names), kind)} by {plural(len(rows), 'sample')}."
    if low <= high:
        text += f" Values from {short(low)} to {short(high)}."
    newest = [(value, layer) for value, layer in zip(rows[-1], names, strict=True) if value is not None]
    newest = [each for each in newest if math.isfinite(each[0])]
    if newest:
        least, most = min(newest), max(newest)
        text += f" At step {story.columns[-1].step:,} smallest in {least[1]} ({short(least[0])})"
        text += f", largest in {most[1]} ({short(most[0])})."
    return f"{text} Not finite in {plural(bad, 'cell')}." if bad else text


def _limits(rows: Sequence[Values]) -> tuple[float, float, int]:
    """Return the smallest and largest finite value (∞ and −∞ if there is none) and the number of non-finite values."""
    low, high, bad = math.inf, -math.inf, 0
    for row in rows:
        # A quick test: the sum of a row of finite numbers is finite.
        if None in row or not math.isfinite(sum(row)):  # type: ignore[arg-type]
            known = [value for value in row if value is not None]
            chosen = [value for value in known if math.isfinite(value)]
            bad += len(known) - len(chosen)
        else:
            chosen = row  # type: ignore[assignment]
        low, high = min(low, min(chosen, default=low)), max(high, max(chosen, default=high))
    return low, high, bad


def figure(name: str, kind: str, title: str, formula: str, summary: str, note: str) -> str:
    """Return a figure's HTML, which the script draws."""
    legend = '<div class="legend"></div>' if kind == "map" else ""
    limits = f'<p class="limits">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="panel" data-figure="{kind}" data-name="{escape(name)}">'
        f"<figcaption><h3>{escape(title)}</h3><p>{escape(formula)}</p></figcaption>"
        f'<div class="plot" tabindex="0" role="group" aria-label="{escape(title)}: use the arrow keys to read values">'
        f'<canvas role="img" aria-label="{escape(summary, 900)}"></canvas></div>{legend}{limits}</figure>'
    )
