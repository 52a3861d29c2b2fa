"""The demo's figure, drawn from its recorded results."""

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

# Okabe and Ito's palette, which color-blind readers can distinguish; line styles differ as well.
_STYLES = [("#0072B2", "-"), ("#E69F00", "--"), ("#D55E00", "-."), ("#555555", ":")]
_SMOOTHING = 9
# A run gets a label if its gradient shrinks by more than this factor from the last block to the first.
_VANISHING = 100.0


def draw(path: Path, outcomes: Sequence[Outcome], labels: Mapping[str, str], baselines: Baselines) -> None:
    """Write a PNG with the training loss by step and the gradient by depth.

    Raises:
        MissingExtraError: matplotlib is not installed.
        RunError: the file can't be written.
    """
    # Readable at the width of a README's column, about 830 pixels.
    figure = load_matplotlib()(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    gradient_step = max((outcome.gradient_step or 0 for outcome in outcomes), default=0)
    for outcome, style in zip(outcomes, _STYLES, strict=True):
        _draw_losses(left, outcome, labels[outcome.name], style, 2 * baselines.unigram)
        if outcome.gradient_step == gradient_step:
            _draw_gradients(right, outcome, style)
    _finish_losses(left, baselines)
    right.set_yscale("log")
    right.set(title=f"Gradient at step {gradient_step}", xlabel="block (1 = next to the input)")
    right.set_ylabel("RMS of ∂loss/∂x at the block's output")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    plotting.save_png(figure, path)


def load_matplotlib() -> type[Figure]:
    """Call `plotting.load_matplotlib` for the demo."""
    return plotting.load_matplotlib("the demo")


def _draw_losses(axes: Axes, outcome: Outcome, label: str, style: tuple[str, str], top: float) -> None:
    color, line = style
    if outcome.diverged_at is not None:
        place = ([outcome.diverged_at], [top * 0.985])
        label = f"{label}: diverged at step {outcome.diverged_at}"
        axes.plot(*place, marker="x", markersize=9, markeredgewidth=2, linestyle="", color=color, label=label)
        return
    visible = [loss if math.isfinite(loss) else math.nan for loss in outcome.losses]
    axes.plot(range(1, len(visible) + 1), _smooth(visible), color=color, linestyle=line, label=label)


def _draw_gradients(axes: Axes, outcome: Outcome, style: tuple[str, str]) -> None:
    color, line = style
    sizes = [size if math.isfinite(size) and size > 0 else math.nan for size in outcome.depth_gradients]
    axes.plot(range(1, len(sizes) + 1), sizes, color=color, linestyle=line, marker=".")
    if sizes and sizes[-1] > _VANISHING * sizes[0]:
        ratio = f"{float(f'{sizes[-1] / sizes[0]:.3g}'):,.0f}"  # three digits, as in the monitor's alarm
        place: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "bottom"}
        axes.annotate(f"block 1 gets 1/{ratio}\nof block {len(sizes)}'s gradient", (0.97, 0.05), color=color, **place)


def _finish_losses(axes: Axes, baselines: Baselines) -> None:
    axes.axhline(baselines.unigram, color="black", linewidth=0.8)
    axes.axhline(baselines.xz, color="black", linewidth=0.8)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "fontsize": 8.5, "ha": "right"}
    axes.annotate(f"unigram baseline {baselines.unigram:.2f} ", (1, baselines.unigram - 0.06), va="top", **place)
    axes.annotate(f"xz, primed with the training text {baselines.xz:.2f} ", (1, baselines.xz), va="bottom", **place)
    axes.set(title="Training loss", xlabel="step", ylabel=f"bits per byte (mean of {_SMOOTHING} steps)")
    axes.set_ylim(baselines.xz - 0.4, 2 * baselines.unigram)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and up to 8 before it."""
    windows = (values[max(0, end - _SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
