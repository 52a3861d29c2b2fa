"""Fuzzing of records: whatever is in record.jsonl, readers return or raise an OmninormError, within time and memory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers import synthetic_run as synthetic
from helpers.mutations import bounded, cases, mutated_bytes, mutated_json, refuses_or_reads

from omninorm.record import Record, final_status, read_history, read_record
from omninorm.report import judge, read_frames, read_run, render


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    """One of each kind of event, of a run with two blocks."""
    story = list(synthetic.events(2, 2, 2, "logits", "blocks", "both"))
    nonfinite = {"kind": "nonfinite", "step": 4, "phase": "loss", "layer": "blocks.1", "value": "nan"}
    return [*story, nonfinite, {"kind": "resume", "step": 2}, {"kind": "end", "step": 4, "reason": "done"}]


def damaged_record(events: list[dict[str, Any]], seed: int) -> bytes:
    """The record with one to three events damaged, or with some of its bytes."""
    chance = random.Random(seed)
    lines = [json.dumps(event).encode() for event in events]
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(lines))
        match chance.choice(("json", "json", "json", "bytes", "remove", "repeat", "move")):
            case "json":
                lines[at] = mutated_json(events[at % len(events)], seed)
            case "bytes":
                lines[at] = mutated_bytes(lines[at], seed)
            case "remove":
                del lines[at]
            case "repeat":
                lines[at:at] = [lines[at]] * chance.choice((1, 20))
            case "move":
                lines.append(lines.pop(at))
    return b"\n".join(lines) + b"\n"


def read_page(folder: Path) -> str:
    story = read_run(folder)
    judge(story)
    return render(story)


def test_damaged_records_are_read_or_refused(events: list[dict[str, Any]], tmp_path: Path) -> None:
    path, pages, histories, frames = tmp_path / "record.jsonl", 0, 0, 0
    for case in range(cases(30)):
        path.write_bytes(damaged_record(events, case))
        with bounded(path.stat().st_size):
            histories += refuses_or_reads(read_history, path)
            for reader in (read_record, final_status):
                refuses_or_reads(reader, path)
            pages += refuses_or_reads(read_page, tmp_path)
            if case % 4 == 0:
                frames += refuses_or_reads(read_frames, tmp_path)
            Record(path).close()
    assert pages >= 0.9 * cases(30), "nearly all damage is skipped line by line"
    assert 0 < histories < cases(30)
    assert frames > 0


def test_damaged_records_of_other_ranks_and_configs_are_read_or_refused(
    events: list[dict[str, Any]], tmp_path: Path
) -> None:
    synthetic.run(tmp_path, blocks=2, samples=2, every=2)
    pages = 0
    for case in range(cases(10)):
        (tmp_path / "record-rank1.jsonl").write_bytes(damaged_record(events, case))
        (tmp_path / "config.json").write_bytes(
            mutated_json({"format": 1, "started": "2026", "train": {"lr": 0.1}}, case)
        )
        with bounded((tmp_path / "record-rank1.jsonl").stat().st_size):
            pages += refuses_or_reads(read_page, tmp_path)
    assert pages > 0


def lists_of_one(step: int) -> dict[str, Any]:
    names = ("stream_rms", "angle", "norm_rms", "gain_max", "weight_rms", "logz")
    return {"kind": "sample", "step": step, "signals": {name: [1.0] for name in names}, "worst": {}}


HEAD = synthetic.head(2, 1, "blocks", "healthy")
NAMES = [f"{index}.{'a.' * 8}b" for index in range(20_000)]


@pytest.mark.parametrize(
    "record",
    [
        # 20,000 names, and 500 samples whose lists would be extended to that length.
        [{**HEAD, "blocks": NAMES, "groups": NAMES}, *(lists_of_one(step) for step in range(1, 501))],
        ['{"kind": "watch", "step": 0, "format": ' + "9" * 4000 + "}"],
        [{"kind": "step", "step": 1, "k" * 100_000: "x"}],
        [HEAD, '{"kind": "steps", "step": 9007199254740991, "first": 9007199254740990, "loss": [1e999, NaN]}'],
        [{**HEAD, "blocks": ["\ud800", "b"]}, lists_of_one(1), lists_of_one(2**53 - 1)],
    ],
    ids=["many names", "long number", "long key", "last step", "surrogates"],
)
def test_hostile_records_are_read_or_refused(record: list[dict[str, Any] | str], tmp_path: Path) -> None:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in record]
    path = tmp_path / "record.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with bounded(path.stat().st_size):
        refuses_or_reads(read_history, path)
        refuses_or_reads(read_page, tmp_path)
        refuses_or_reads(read_frames, tmp_path)


@pytest.mark.parametrize("depth", range(900, 1000, 10))
def test_deeply_nested_config_is_shown_or_ignored(depth: int, tmp_path: Path) -> None:
    synthetic.run(tmp_path, blocks=1, samples=1, every=1)
    (tmp_path / "config.json").write_text(f'{{"a": {"[" * depth}{"]" * depth}}}')
    assert refuses_or_reads(read_page, tmp_path)
