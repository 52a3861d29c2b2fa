"""The benchmark's output folder: results.json and bench.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omninorm.bench.figure import draw
from omninorm.record.files import write_file, writing

RESULTS_FILE, FIGURE_FILE = "results.json", "bench.png"


def to_json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)


def write(folder: Path, result: Mapping[str, Any], *, plot: bool) -> list[Path]:
    """Write the result, and its figure if `plot` is true; return the paths. Existing files are replaced.

    Raises:
        MissingExtraError: `plot` is true, but matplotlib is not installed.
        RunError: the folder can't be written.
    """
    results, figure = folder / RESULTS_FILE, folder / FIGURE_FILE
    with writing(results):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(results, (to_json(result) + "\n").encode())
    if plot:
        draw(figure, result)
    return [results, figure] if plot else [results]
