"""Fuzzing of plans: each damaged file is read or refused in one sentence."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from helpers.mutations import bounded, cases, mutated_bytes, mutated_json, refuses_or_reads

from omninorm.errors import ConfigError
from omninorm.experiments.compare import read_plan
from omninorm.experiments.compare.plan import check_memory

PLAN: dict[str, Any] = {
    "title": "norms",
    "claims": ["C3"],
    "text": None,
    "model": None,
    "studies": [
        {
            "name": "norms",
            "protocol": "train",
            "normalization": ["rmsnorm", "none"],
            "placement": ["pre", "none"],
            "depth": [2],
            "lr": [0.01],
            "seeds": 2,
            "margin": 0.02,
            "vary": {"qk_norm": [None, False]},
            "settings": {"d_model": 16, "n_heads": 2, "steps": 3, "seq_len": 16, "norm_eps": 1e-6, "init": "xavier"},
        }
    ],
}
YAML = """title: norms
studies:
  - &one {name: a, protocol: train, depth: [2, 3], seeds: 2, settings: {d_model: 16, n_heads: 2}}
  - {<<: *one, name: b}
"""


def expand(path: Path) -> None:
    for cell in read_plan(path).cells().values():
        with suppress(ConfigError):  # a plan may have any number of runs that are too large
            check_memory(cell)


def test_intact_plans_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(PLAN))
    (tmp_path / "p.yaml").write_text(YAML)
    assert refuses_or_reads(expand, tmp_path / "p.json")
    assert refuses_or_reads(expand, tmp_path / "p.yaml")


def test_damaged_plans_are_read_or_refused(tmp_path: Path) -> None:
    read = 0
    for case in range(cases(150)):
        path = tmp_path / ("p.json" if case % 3 else "p.yaml")
        path.write_bytes(mutated_json(PLAN, case) if case % 3 else mutated_bytes(YAML.encode(), case))
        with bounded(path.stat().st_size):
            read += refuses_or_reads(expand, path)
    assert 0 < read < cases(150)
