"""read_frames: read a record as pandas DataFrames."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from omninorm.errors import MissingExtraError
from omninorm.record.signals import SIGNALS
from omninorm.report.reading import choose, find_record, read_run
from omninorm.report.scan import Scan
from omninorm.report.story import Watched
from omninorm.report.values import DamageError, mapping, numbers


def read_frames(path: str | Path, samples: int | None = None) -> dict[str, Any]:
    """Return a run's record as three pandas DataFrames.

    "steps" has the columns step, loss, grad_norm, lr, bits_per_byte; "samples" is tidy, with one row per value and the
    columns step, signal, layer, value (None becomes NaN); "alarms" has the fields of an alarm and `ranks`.

    Args:
        path: a run's folder, or its record.jsonl.
        samples: read only about this many samples, evenly spaced; None reads all (0.4 ms per sample with 48 blocks).

    Raises:
        MissingExtraError: pandas is not installed.
        RunError: as `read_run`.
    """
    try:
        pandas: Any = importlib.import_module("pandas")
    except ImportError as error:
        raise MissingExtraError("read_frames needs pandas", "", "Install it with pip install pandas") from error
    story = read_run(path)
    curves = {name: dict(zip(*series, strict=True)) for name, series in story.series.items()}
    curves["bits_per_byte"] = dict(zip(*story.evals, strict=True))
    steps = sorted({step for curve in curves.values() for step in curve})
    named = {name: [curve.get(step) for step in steps] for name, curve in curves.items()}
    fields = ("step", "severity", "rule", "layer", "evidence", "remedy", "source", "ranks")
    return {
        "steps": pandas.DataFrame({"step": steps, **{n: pandas.Series(v, dtype=float) for n, v in named.items()}}),
        "samples": _tidy(pandas, find_record(path), story.watched or Watched(), samples),
        "alarms": pandas.DataFrame([[getattr(a, f) for f in fields] for a in story.alarms], columns=list(fields)),
    }


def _tidy(pandas: Any, path: Path, known: Watched, limit: int | None) -> Any:
    scan = Scan(path)
    rows: dict[str, list[Any]] = {"step": [], "signal": [], "layer": [], "value": []}
    names = {axis: known.names(axis) for axis in ("run", "block", "norm", "group")}
    steps = sorted(scan.samples)
    with open(path, "rb") as file:
        for step in choose(steps, (), max(2, limit)) if limit is not None else steps:
            try:
                signals = mapping(scan.sample(file, step).get("signals"))
                columns = {name: numbers(values) for name, values in signals.items() if name in SIGNALS}
            except DamageError:
                continue
            for name, values in columns.items():
                layers = names[SIGNALS[name].axis][: len(values)]
                rows["step"] += [step] * len(layers)
                rows["signal"] += [name] * len(layers)
                rows["layer"] += layers
                rows["value"] += values[: len(layers)]
    rows["value"] = pandas.Series(rows["value"], dtype=float)
    return pandas.DataFrame(rows).astype({"signal": "category", "layer": "category", "step": "int64"})
