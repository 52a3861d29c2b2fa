"""What the lesson's cells use beside omninorm: figures for light and dark pages, and numbers that are remembered."""

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
BUILDING = "OMNINORM_BUILDS_DOCS"  # set by conf.py: a reader may change a page and run it, a build may not

# Colours that can be told apart on white and on black, and by readers who see fewer of them.
BLUE, ORANGE, GREEN, PINK = COLOURS = "#3987e5", "#d95926", "#1f9d6b", "#c2569b"
_INK = "#010203"  # stands for the page's text colour, which only the page knows

torch.manual_seed(0)
torch.set_printoptions(precision=4, sci_mode=False)


def number(name: str, value: float, shown: str = "{:.3g}", within: float | None = 0.02) -> str:
    """Makes a computed number available to the page's text, as {glue:text}`name`, and compares it with numbers.json.

    Args:
        name: page.what.
        value: what was computed just now.
        shown: how the text shows it.
        within: relative deviation that is allowed; None for what depends on the machine, which is not compared.

    Raises:
        ValueError: it has changed, and the documentation is being built. Rewrite the page and set the variable in the
            message to remember the new one.
    """
    if within is not None and BUILDING in os.environ:
        _compare(name, float(value), within)
    glue(name, shown.format(value), display=False)
    return shown.format(value)


def check(holds: object, said: object = "") -> None:
    """Raises ValueError for something that a page says and that does not hold, while the documentation is built."""
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
    """An empty figure of some panels beside each other, in the page's style."""
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
    """A figure as SVG that takes the page's text colour; `alt` says in words what is to be seen."""
    for axis in made.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, labelcolor=_INK)
    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        made.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    drawn = content.getvalue()
    return svg(drawn[drawn.index("<svg") :].replace(_INK, "currentColor"), alt)


def svg(drawn: str, alt: str, caption: str = "") -> HTML:
    """An SVG drawing with its description."""
    described = re.sub(r"<svg", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"', drawn, count=1)
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return HTML(f'<figure class="drawing">{described}{below}</figure>')


def race(contestants: dict[str, Callable[[torch.Tensor], torch.Tensor]], rows: int, width: int) -> dict[str, float]:
    """Microseconds of each function of a tensor of this shape: medians of rounds in random order, over ten tensors in
    turn, so that none of them still lies in a cache."""
    inputs = [torch.randn(rows, width) for _ in range(10)]
    runners = [Contestant(name, lambda at, f=f: f(inputs[at]), "") for name, f in contestants.items()]
    samples = time_case(Case("", runners, len(inputs), grad=False), seconds=4)
    return {name: statistics.median(times) / 1000 for name, times in samples.items()}
