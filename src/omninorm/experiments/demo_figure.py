"""The demo's picture: what the runs recorded, drawn. Reads results, computes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omninorm.experiments import plotting
from omninorm.experiments.demo import Baselines, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too; line styles differ as well.
_STYLES = [("#0072B2", "-"), ("#E69F00", "--"), ("#D55E00", "-."), ("#555555", ":")]
_SMOOTHING = 9


def draw(path: Path, outcomes: Sequence[Outcome], labels: Mapping[str, str], baselines: Baselines) -> None:
    """Writes a PNG: the training loss by step, and the gradient norm by depth at initialization.

    Raises:
        MissingExtraError: matplotlib is not installed.
        RunError: the file can't be written.
    """
    figure = load_matplotlib()(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for outcome, style in zip(outcomes, _STYLES, strict=True):
        _draw_losses(left, outcome, labels[outcome.name], style, 2 * baselines.unigram)
        _draw_depths(right, outcome, labels[outcome.name], style)
    _finish_losses(left, baselines)
    _finish_depths(right)
    plotting.save_png(figure, path)


def load_matplotlib() -> type[Figure]:
    """As `plotting.load_matplotlib`, for the demo."""
    return plotting.load_matplotlib("the demo")


def _draw_losses(axes: Axes, outcome: Outcome, label: str, style: tuple[str, str], top: float) -> None:
    color, line = style
    visible = [loss if math.isfinite(loss) else math.nan for loss in outcome.losses]
    if outcome.diverged_at is not None:
        told = f"{label}: diverged at step {outcome.diverged_at}"
        axes.plot([outcome.diverged_at], [top * 0.985], marker="x", markersize=9, linestyle="", color=color, label=told)
        return
    axes.plot(range(1, len(visible) + 1), _smooth(visible), color=color, linestyle=line, label=label)


def _draw_depths(axes: Axes, outcome: Outcome, label: str, style: tuple[str, str]) -> None:
    color, line = style
    norms = [norm if math.isfinite(norm) and norm > 0 else math.nan for norm in outcome.depth_grad_norms]
    axes.plot(range(1, len(norms) + 1), norms, color=color, linestyle=line, marker=".", label=label)


def _finish_losses(axes: Axes, baselines: Baselines) -> None:
    axes.axhline(baselines.unigram, color="black", linewidth=0.8)
    axes.axhline(baselines.xz, color="black", linewidth=0.8)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "fontsize": 8, "ha": "right", "va": "bottom"}
    axes.annotate(f"byte frequencies {baselines.unigram:.2f}", (0.99, baselines.unigram), **place)
    axes.annotate(f"xz after training text {baselines.xz:.2f}", (0.99, baselines.xz), **place)
    axes.set(title="Training loss", xlabel="step", ylabel=f"bits per byte (mean of {_SMOOTHING} steps)")
    axes.set_ylim(baselines.xz - 0.4, 2 * baselines.unigram)
    axes.legend(fontsize=8)


def _finish_depths(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set(title="Before the first step", xlabel="block (1 = next to the input)", ylabel="gradient norm of the block")
    axes.legend(fontsize=8)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and up to 8 before it."""
    windows = (values[max(0, end - _SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
