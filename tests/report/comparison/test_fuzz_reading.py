"""Fuzzing of results.json and timings.json: each damaged file is read and drawn, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.comparison_results import CARD, CONDITION, RESULTS, ROW, STUDY, TIMINGS, write
from helpers.mutations import bounded, cases, mutated_json, refuses_or_reads

from omninorm.report.comparison import read_comparison
from omninorm.report.comparison.markdown import render as render_markdown
from omninorm.report.comparison.page import render

# Every optional part of the format is present.
FULL_ROW = {
    **ROW, "outcomes": {"0": "learned", "1": "diverged"}, "by_rate": [[0.001, 3.5], [0.01, 3.0]],
    "sensitivity": 0.2, "spike_score": 0.0,
}  # fmt: skip
INIT = {**ROW, "curve": [], "stream_rms": [1.0, 2.0, None], "grad_norms": [0.1, 0.0, 0.3]}
LOG = {**CONDITION, "scale": "log", "outcome": "unclear", "more": 3}
FULL: dict[str, Any] = {
    **RESULTS,
    "studies": [
        {**STUDY, "configurations": [FULL_ROW, {**FULL_ROW, "label": "layernorm pre"}]},
        {**STUDY, "name": "start", "protocol": "init", "configurations": [INIT], "comparisons": []},
        {**STUDY, "name": "ramp", "protocol": "ramp"},
    ],
    "claims": [{**CARD, "conditions": [CONDITION, LOG]}],
    "failures": {"a": "no memory"},
}


def damaged(folder: Path, case: int, full: dict[str, Any] = FULL, timings: dict[str, Any] = TIMINGS) -> int:
    """Write the files, one of them damaged; return the size of both."""
    write(folder, full, timings)
    name, good = (("results.json", full), ("timings.json", timings))[case % 4 == 3]
    (folder / name).write_bytes(mutated_json(good, case))
    return sum((folder / each).stat().st_size for each in ("results.json", "timings.json"))


def test_damaged_results_are_read_or_refused(tmp_path: Path) -> None:
    read = 0
    for case in range(cases(120)):
        with bounded(damaged(tmp_path, case)):
            read += refuses_or_reads(read_comparison, tmp_path)
    assert 0 < read < cases(120)


@pytest.mark.slow
def test_what_is_read_can_be_rendered(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def show(folder: Path) -> None:
        comparison = read_comparison(folder)
        render(comparison)
        render_markdown(comparison, "figures", ["study-norms.svg"])

    shown = 0
    for case in range(min(cases(20), 300)):  # a figure takes a fifth of a second, so there are only two
        full = {**FULL, "studies": [FULL["studies"][case % 3]]}
        with bounded(damaged(tmp_path, case, full, {**TIMINGS, "claims": []})):
            shown += refuses_or_reads(show, tmp_path)
    assert 0 < shown < min(cases(20), 300)


def test_a_file_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "timings.json").write_text('{"format": 2, "cells": ' + "[" * 100_000)
    with bounded(0):
        assert not refuses_or_reads(read_comparison, tmp_path)
