"""The benchmark's figure: GB/s by width, with clone as the measured bound. It is drawn from results only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omninorm.bench import cases
from omninorm.experiments import plotting
from omninorm.timing import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which color-blind readers can distinguish; line styles differ as well.
_STYLES = {
    OURS: ("#0072B2", "-"),
    "clone": ("black", ":"),
    "torch.nn": ("#E69F00", "--"),
    "torch.nn.LayerNorm": ("#009E73", "-."),
    "transformers Llama": ("#D55E00", "--"),
    "transformers Qwen3": ("#CC79A7", "-."),
    "onnxruntime": ("#56B4E9", "-."),
}
_PANELS = ((cases.RMS_FORWARD, "fp32"), (cases.RMS_FORWARD, "bf16"), (cases.RMS_BOTH, "fp32"), (cases.RMS_BOTH, "bf16"))


def load_matplotlib() -> type[Figure]:
    """Call `plotting.load_matplotlib` for the benchmark."""
    return plotting.load_matplotlib("the benchmark", otherwise=", or pass --no-plot")


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Write a PNG: RMSNorm's forward pass, and forward and backward together, in fp32 and bf16.

    A panel without measurements is labelled as such.

    Raises:
        MissingExtraError: matplotlib is not installed.
        RunError: the file can't be written.
    """
    figure = load_matplotlib()(figsize=(10, 7.5), layout="constrained")
    threads, rows = result["settings"]["threads"][0], max(result["settings"]["rows"])
    for axes, (case, dtype) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        _draw_panel(axes, lines_of(result, case, dtype, threads, rows))
        axes.set(title=f"{case}, {dtype}", xlabel="width", ylabel="GB/s")
    named = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=9)
    note = "clone reads and writes once, through the caches"
    figure.suptitle(f"{rows} rows, {threads} thread{'s' if threads > 1 else ''}; {note}")
    plotting.save_png(figure, path)


def lines_of(
    result: Mapping[str, Any], case: str, dtype: str, threads: int, rows: int
) -> dict[str, list[tuple[int, float]]]:
    """Return (width, GB/s) of every contestant, by increasing width."""
    wanted = (case, dtype, threads, rows, "raised")
    lines: dict[str, list[tuple[int, float]]] = {}
    for each in sorted(result["measurements"], key=lambda entry: int(entry["width"])):
        if tuple(each[name] for name in ("case", "dtype", "threads", "rows", "allocator")) == wanted:
            for name, contestant in each["contestants"].items():
                lines.setdefault(name, []).append((each["width"], contestant["gb_per_s"]))
    return lines


def _draw_panel(axes: Axes, lines: Mapping[str, list[tuple[int, float]]]) -> None:
    if not lines:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        return
    for name, points in lines.items():
        color, line = _STYLES.get(name, ("#555555", ":"))
        widths, rates = zip(*points, strict=True)
        axes.plot(widths, rates, color=color, linestyle=line, marker=".", label=name)
    axes.set_xscale("log", base=2)
    ticks = [width for width, _ in next(iter(lines.values()))]
    axes.set_xticks(ticks, [str(width) for width in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
