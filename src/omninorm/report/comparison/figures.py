"""A comparison's figures as SVG: intervals of claims, curves and profiles of studies.

Colours are from Okabe and Ito's palette, which colour-blind readers can distinguish; shapes differ as well. The grey of
the text is legible on white and on black.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from omninorm.errors import MissingExtraError
from omninorm.report.comparison.reading import Card, Condition, Configuration, StudyResults
from omninorm.report.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#757b84"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a00", "#7f7f7f")
LINES = ("-", "--", "-.", ":")
ANSWERS = {"yes": ("#009E73", "o"), "no": ("#D55E00", "X"), "unclear": (INK, "s")}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "omninorm",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_MOST_DEPTHS = 5
_WIDTH = 9.0
# Intervals are clipped at this multiple of the span of all means.
_REACH = 1.0
_UNIFORM = 8.0  # bits per byte


def claim_figure(card: Card) -> bytes | None:
    """Draw the conditions' means and intervals with their thresholds, one panel per unit."""
    groups: dict[tuple[str, str], list[Condition]] = {}
    for condition in card.conditions:
        if condition.mean is not None:
            groups.setdefault((condition.unit, condition.scale), []).append(condition)
    if not groups:
        return None
    heights = [len(group) + 1.6 for group in groups.values()]
    with _figure(_WIDTH, 0.26 * sum(heights) + 0.2) as (figure, out):
        panels = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, ((unit, scale), group) in zip(panels, groups.items(), strict=True):
            _draw_conditions(axes, unit, scale, group)
    return out.getvalue()


def study_figure(study: StudyResults) -> bytes | None:
    """Draw the curves of a "train" study, the profiles of an "init" study or the learning rates of a "ramp" study.

    Returns None if there is nothing to draw.
    """
    draw = {"train": _draw_train, "init": _draw_init, "ramp": _draw_ramp}.get(study.protocol)
    return draw(study) if draw else None


# Claims ----------------------------------------------------------------------------------------------------------


def _draw_conditions(axes: Axes, unit: str, scale: str, group: Sequence[Condition]) -> None:
    value = _exp if scale == "log" else float
    threshold = group[0].threshold
    means = [condition.mean for condition in group if condition.mean is not None]
    span = max([*means, threshold]) - min([*means, threshold]) or 1.0
    ends = (min([*means, threshold]) - _REACH * span, max([*means, threshold]) + _REACH * span)
    for place, condition in enumerate(group):
        assert condition.mean is not None
        color, marker = ANSWERS.get(condition.outcome, ANSWERS["unclear"])
        if condition.low is not None and condition.high is not None:
            low, high = max(condition.low, ends[0]), min(condition.high, ends[1])
            axes.plot([value(low), value(high)], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([value(condition.mean)], [place], marker=marker, color=color, markersize=6)
    for each in sorted({condition.threshold for condition in group}):
        axes.axvline(value(each), color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(group)), [_short(condition.label, 60) for condition in group])
    axes.set_ylim(len(group) - 0.4, -0.6)
    axes.set_xlabel(_short(unit, 90))
    if scale == "log":
        _logarithmic(axes, "x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


# Studies ---------------------------------------------------------------------------------------------------------


def _draw_train(study: StudyResults) -> bytes | None:
    by_depth = _by_depth([row for row in study.configurations if any(y is not None for _, y in row.curve)])
    if not by_depth:
        return None
    with_rates = any(len(row.by_rate) > 1 for rows in by_depth.values() for row in rows)
    with _figure(_WIDTH, 4.6 if with_rates else 2.5) as (figure, out):
        panels = figure.subplots(2 if with_rates else 1, len(by_depth), squeeze=False, sharey="row")
        for column, (depth, rows) in enumerate(by_depth.items()):
            axes = panels[0, column]
            for at, row in enumerate(rows):
                _line(axes, at, row.label, [(x, y) for x, y in row.curve if y is not None])
            axes.set(title=f"{depth} blocks", xlabel="step")
            if with_rates:
                _draw_rates(panels[1, column], rows)
        panels[0, 0].set_ylabel("training loss, bits per byte")
        if with_rates:
            panels[1, 0].set_ylabel("held out, bits per byte")
        shown = [
            y for rows in by_depth.values() for row in rows for _, y in row.curve if y is not None and y <= _UNIFORM
        ]
        if shown:  # losses worse than a uniform guess are outside the panel
            panels[0, 0].set_ylim(min(shown) - 0.2, max(shown) + 0.2)
        _legend(figure, panels[0, 0])
    return out.getvalue()


def _draw_rates(axes: Axes, rows: Sequence[Configuration]) -> None:
    for at, row in enumerate(rows):
        _line(axes, at, row.label, [(x, y) for x, y in row.by_rate if y is not None], marker=".")
    axes.set_xlabel("learning rate")
    _logarithmic(axes, "x")


def _draw_init(study: StudyResults) -> bytes | None:
    by_depth = _by_depth([row for row in study.configurations if row.stream_rms])
    if not by_depth:
        return None
    depth, rows = max(by_depth.items())
    with _figure(_WIDTH, 3.0) as (figure, out):
        left, right = figure.subplots(1, 2)
        for at, row in enumerate(rows):
            _line(left, at, row.label, _positive(row.stream_rms))
            _line(right, at, row.label, _positive(row.grad_norms))
        left.set(
            title=f"{depth} blocks, before the first step",
            xlabel="block",
            ylabel="RMS of the residual stream",
            yscale="log",
        )
        right.set(xlabel="block", ylabel="gradient norm of the block", yscale="log")
        _legend(figure, left)
    return out.getvalue()


def _draw_ramp(study: StudyResults) -> bytes | None:
    rows = [row for row in study.configurations if any(row.values.values())]
    if not rows:
        return None
    with _figure(_WIDTH, 0.26 * len(rows) + 0.8) as (figure, out):
        axes = figure.subplots()
        for place, row in enumerate(rows):
            rates = [value for value in row.values.values() if value]
            axes.plot(rates, [place] * len(rates), marker="o", linestyle="", color=COLORS[0], alpha=0.7)
        axes.set_yticks(range(len(rows)), [f"{_short(row.label, 40)}, {row.depth} blocks" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("largest tolerable learning rate, one dot per seed")
        _logarithmic(axes, "x")
    return out.getvalue()


# Parts -----------------------------------------------------------------------------------------------------------


def _line(axes: Axes, at: int, label: str, points: Sequence[tuple[float, float]], marker: str = "") -> None:
    color, line = COLORS[at % len(COLORS)], LINES[(at // 2) % len(LINES)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, color=color, linestyle=line, marker=marker, linewidth=1.4, label=_short(label, 40))


def _exp(value: float) -> float:
    return math.exp(max(-700.0, min(value, 700.0)))


def _logarithmic(axes: Axes, which: str) -> None:
    """Make an axis logarithmic with plain numbers, three per decade if the range is short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,), numticks=8))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _positive(values: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(block, value) for block, value in enumerate(values, 1) if value is not None and value > 0]


def _by_depth(rows: Sequence[Configuration]) -> dict[int, list[Configuration]]:
    found: dict[int, list[Configuration]] = {}
    for row in rows:
        found.setdefault(row.depth, []).append(row)
    return dict(list(found.items())[:_MOST_DEPTHS])


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _short(text: str, limit: int) -> str:
    """Shorten a label and escape $, which matplotlib would read as the start of a formula."""
    return plain(text, limit).replace("$", r"\$")


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, io.BytesIO]]:
    """Yield a figure to draw on and the buffer that receives its SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[compare]"'
        raise MissingExtraError("A comparison's page needs matplotlib", "", remedy) from error
    out = io.BytesIO()
    style: Any = _STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, out
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
