"""Helpers for the lesson's cells: figures for light and dark pages, and checks of the numbers on the pages."""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from IPython.display import HTML
from matplotlib.figure import Figure
from myst_nb import glue

from omninorm.timing import Case, Contestant, time_case

NUMBERS = Path(__file__).with_name("numbers.json")
UPDATE = "OMNINORM_UPDATE_NUMBERS"
BUILDING = "OMNINORM_BUILDS_DOCS"  # set by conf.py; a reader may change a page and run it, but a build must not differ

# Colors that can be distinguished on white and on black, and by color-blind readers.
BLUE, ORANGE, GREEN, PINK = COLOURS = "#3987e5", "#d95926", "#1f9d6b", "#c2569b"
_INK = "#010203"  # replaced by the page's text color, which only the page knows

torch.manual_seed(0)
torch.set_printoptions(precision=4, sci_mode=False)


def number(name: str, value: float, shown: str = "{:.3g}", within: float | None = 0.02) -> str:
    """Make a computed number available to the page's text, as {glue:text}`name`, and compare it with numbers.json.

    Args:
        name: the page, a dot, and a name for the number.
        value: the computed number.
        shown: the format in the text.
        within: the allowed relative difference; None for numbers that depend on the machine, which are not compared.

    Raises:
        ValueError: the number has changed while the documentation is built. Rewrite the page, and set the environment
            variable in the message to record the new number.
    """
    if within is not None and BUILDING in os.environ:
        _compare(name, float(value), within)
    glue(name, shown.format(value), display=False)
    return shown.format(value)


def check(holds: object, said: object = "") -> None:
    """Raise ValueError if a statement of the page does not hold while the documentation is built."""
    if BUILDING in os.environ and not holds:
        raise ValueError(f"this page says otherwise: {said}. Read the page.")


def _compare(name: str, value: float, within: float) -> None:
    known = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}
    if os.environ.get(UPDATE):
        known[name] = float(f"{value:.10g}")
        NUMBERS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
    elif name not in known or not math.isclose(value, known[name], rel_tol=within, abs_tol=1e-12):
        received = f"{value:.6g} for {known.get(name)} ± {100 * within:g} %"
        raise ValueError(f"{name} differs from numbers.json: {received}. Read the page, then set {UPDATE}=1.")


def figure(width: float = 7.0, height: float = 3.2, panels: int = 1) -> tuple[Figure, list[matplotlib.axes.Axes]]:
    """Return an empty figure with some panels next to each other, in the page's style."""
    style = {
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context({**style, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        made = Figure(figsize=(width, height), layout="constrained")
        axes = list(made.subplots(1, panels, squeeze=False)[0])
    made.patch.set_alpha(0)
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_prop_cycle(color=COLOURS)
    return made, axes


def show(made: Figure, alt: str) -> HTML:
    """Return a figure as SVG in the page's text color; `alt` describes it in words."""
    for axis in made.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, labelcolor=_INK)
    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        made.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    drawn = content.getvalue()
    return svg(drawn[drawn.index("<svg") :].replace(_INK, "currentColor"), alt)


def svg(drawn: str, alt: str, caption: str = "") -> HTML:
    """Return an SVG drawing with its description."""
    described = re.sub(r"<svg", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"', drawn, count=1)
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return HTML(f'<figure class="drawing">{described}{below}</figure>')


def race(contestants: dict[str, Callable[[torch.Tensor], torch.Tensor]], rows: int, width: int) -> dict[str, float]:
    """Return the microseconds of each function of a tensor of this shape: medians of rounds in random order.

    Ten tensors are used in turn, so that none of them is still in a cache."""
    inputs = [torch.randn(rows, width) for _ in range(10)]
    runners = [Contestant(name, lambda at, f=f: f(inputs[at]), "") for name, f in contestants.items()]
    samples = time_case(Case("", runners, len(inputs), grad=False), seconds=4)
    return {name: statistics.median(times) / 1000 for name, times in samples.items()}
