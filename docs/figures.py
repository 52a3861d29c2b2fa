"""Draw the figures of the README and the documentation from the committed results: `make figures`.

| figure | drawn from | results made by |
|---|---|---|
| bench.png | bench.json | omninorm bench |
| demo.png | demo.json, a copy of the demo's results.json | omninorm demo |
| claims.md, claims/*.svg | claims/results.json, claims/timings.json | omninorm compare --preset chapter |
| placements/*.svg | placements/results.json, placements/timings.json | omninorm compare benchmarks/placements.yaml |
| signals/*.svg | signals/results.json | python benchmarks/signals.py |
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from omninorm.bench import figure as bench_figure
from omninorm.experiments import demo_figure
from omninorm.experiments.demo import VARIANTS, Baselines, Outcome
from omninorm.record.files import write_file
from omninorm.record.signals import SIGNALS
from omninorm.report.comparison.figures import study_figure
from omninorm.report.comparison.markdown import write_markdown
from omninorm.report.comparison.reading import read_comparison

DOCS = Path(__file__).parent
GREY = "#808080"  # readable on both white and black


def read(name: str) -> Any:
    return json.loads((DOCS / name).read_text(encoding="utf-8"))


def draw_demo() -> None:
    results = read("demo.json")
    optional = ("gradient_step", "diverged_at")  # None is a value of these, not a NaN
    outcomes = [
        Outcome(**{name: value if name in optional else _with_nan(value) for name, value in run.items()})
        for run in results["runs"]
    ]
    labels = {name: label for name, (label, _) in VARIANTS.items()}
    demo_figure.draw(DOCS / "demo.png", outcomes, labels, Baselines(**results["baselines"]))


def draw_placements() -> None:
    for study in read_comparison(DOCS / "placements").studies:
        svg = study_figure(study)
        assert svg is not None
        write_file(DOCS / "placements" / f"{study.name}.svg", svg)


def draw_signals() -> None:
    """Draw one figure per signal: the healthy run on the left, the faulty one on the right, on the same scale."""
    for name, results in read("signals/results.json").items():
        style = {
            "text.color": GREY,
            "axes.labelcolor": GREY,
            "axes.edgecolor": GREY,
            "xtick.color": GREY,
            "ytick.color": GREY,
        }
        with rc_context({**style, "font.size": 8, "svg.fonttype": "none", "svg.hashsalt": name}):
            figure = Figure(figsize=(6.4, 1.9), layout="constrained")
            figure.patch.set_alpha(0)
            axes = figure.subplots(1, 2, sharey=True)
            for axis, which, title in zip(axes, ("healthy", "ill"), ("healthy", results["title"]), strict=True):
                _draw_series(axis, results[which], SIGNALS[name].logarithmic)
                axis.set_title(title, fontsize=8)
            figure.savefig(DOCS / "signals" / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _draw_series(axis: Axes, series: dict[str, list[Any]], logarithmic: bool) -> None:
    axis.patch.set_alpha(0)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("step")
    layers = len(series["values"][0])
    for layer in range(layers):
        depth = layer / max(layers - 1, 1)  # 0 for the first layer, 1 for the last
        colour = (0.22 + 0.6 * depth, 0.53 - 0.2 * depth, 0.9 - 0.75 * depth)
        axis.plot(series["steps"], _column(series["values"], layer, logarithmic), color=colour, linewidth=1)
    if logarithmic:
        axis.set_yscale("log")


def _column(values: Sequence[Sequence[float | None]], layer: int, logarithmic: bool) -> list[float]:
    """Return one layer's values, with NaN (a gap) for those that can't be drawn."""
    column = [row[layer] if layer < len(row) else None for row in values]
    return [math.nan if value is None or (logarithmic and value <= 0) else value for value in column]


def _with_nan(value: Any) -> Any:
    """Replace null, the JSON form of a number that is not finite, by NaN."""
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


if __name__ == "__main__":
    bench_figure.draw(DOCS / "bench.png", read("bench.json"))
    draw_demo()
    write_markdown(read_comparison(DOCS / "claims"), DOCS / "claims.md")
    draw_placements()
    draw_signals()
