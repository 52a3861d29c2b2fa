"""Synthetic results.json and timings.json of a comparison."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

CONDITION = {
    "label": "4 blocks", "outcome": "yes", "more": 0, "mean": 0.5, "low": 0.4, "high": 0.6, "threshold": 1.0,
    "above": False, "seeds": 5, "unit": "bits per byte", "scale": "linear",
}  # fmt: skip
CARD = {
    "id": "C3", "claim": "The mean is not needed.", "measured": "Bits per byte.", "conditions": [CONDITION],
    "verdict": "holds", "found": "No difference.", "source": "A paper.", "command": "omninorm compare --preset C3",
}  # fmt: skip
ROW = {
    "label": "rmsnorm pre", "configuration": {}, "depth": 4, "lr": 0.003, "values": {"0": 3.0, "1": None}, "lost": ["1"],
    "missing": 0, "curve": [[10, 5.0], [20, 4.0], [30, None]],
}  # fmt: skip
STUDY = {
    "name": "norms", "protocol": "train", "value": "score", "unit": "bits per byte", "lower_is_better": True, "margin": 0.02,
    "configurations": [ROW, {**ROW, "label": "layernorm pre"}],
    "comparisons": [{"depth": 4, "label": "layernorm pre", "against": "rmsnorm pre", "seeds": 1, "mean": 0.01, "low": None,
                     "high": None, "p": 1.0, "spread": None, "p_holm": 1.0, "verdict": "no verdict"}],
}  # fmt: skip
RESULTS = {
    "format": 2,
    "plan": {"title": "Norms", "claims": ["C2", "C3"], "studies": [], "model": None},
    "text": {"name": "kjv", "sha256": "0" * 64, "bytes": 1000, "unigram_bits_per_byte": 4.4},
    "studies": [STUDY],
    "claims": [CARD],
    "failures": {},
}
TIMINGS = {"format": 2, "claims": [{**CARD, "id": "C2"}], "cells": {"a": {"seconds": 30.0}, "b": {"seconds": 90.0}}}


def write(folder: Path, results: dict[str, Any] = RESULTS, timings: dict[str, Any] = TIMINGS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "timings.json").write_text(json.dumps(timings))
    return folder


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    """Return the results with another value at a path."""
    found = copy.deepcopy(RESULTS)
    place: Any = found
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = to
    return found
