"""record.jsonl: complete and incomplete lines, resumes, and invalid events."""

from __future__ import annotations

import json
import math

import pytest

from omninorm.errors import RunError
from omninorm.experiments import EvalEvent, Record, StepEvent, StopEvent, read_history, read_record
from omninorm.experiments.events import from_record, to_record


def _write(path, *events):
    record = Record(path)
    for event in events:
        record.append(event)
    record.close()


def _step(step, loss=1.0):
    return {"kind": "step", "step": step, "loss": loss}


def test_events_are_lines_of_strict_json_and_can_be_read_back(tmp_path):
    path = tmp_path / "record.jsonl"
    event = {"kind": "diverged", "step": 3, "loss": math.nan, "clock": {"seconds": math.inf}}
    _write(path, _step(1), event)
    lines = path.read_text(encoding="utf-8").splitlines()
    # Strict JSON parsers refuse NaN, so it is written as a string.
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] == "nan"
    back = read_history(path)
    assert back[0] == _step(1)
    assert math.isnan(back[1]["loss"])
    assert back[1]["clock"]["seconds"] == math.inf


@pytest.mark.parametrize("torn", [b'{"kind": "st', b'{"kind": "step", "step": 2, "loss": 1.0}', b"\xff\xfe", b"{"])
def test_incomplete_last_line_is_ignored_on_reading_and_removed_on_writing(tmp_path, torn):
    path = tmp_path / "record.jsonl"
    _write(path, _step(1))
    with open(path, "ab") as file:
        file.write(torn)
    assert read_history(path) == [_step(1)]
    _write(path, _step(2, 5.0))
    assert read_history(path) == [_step(1), _step(2, 5.0)]


def test_damaged_line_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_bytes(b'{"kind": "step", "step": 1}\nnonsense\n{"kind": "step", "step": 2}\n')
    with pytest.raises(RunError, match=r"Line 2 of .*record.jsonl"):
        read_record(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(RunError, match="Line 1 of"):
        read_record(path)


def test_missing_record_is_read_as_empty(tmp_path):
    assert read_record(tmp_path / "record.jsonl") == []


def test_record_of_a_resumed_run_reads_like_that_of_an_uninterrupted_one(tmp_path):
    straight, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    story = [{"kind": "eval", "step": 0, "bits_per_byte": 8.0}, *(_step(n, 1 / n) for n in range(1, 6))]
    end = {"kind": "finished", "step": 5}
    _write(straight, *story, end)
    first, second, third = story[:4], story[3:4], story[4:]
    accident = {"kind": "interrupted", "step": 3, "signal": 2}
    _write(broken, *first, {"kind": "resume", "step": 2}, *second, accident, {"kind": "resume", "step": 3}, *third, end)
    assert read_record(broken) == read_record(straight) == [*story, end]
    assert len(read_history(broken)) == 11


def test_events_after_the_checkpoint_of_a_killed_run_are_discarded(tmp_path):
    path = tmp_path / "record.jsonl"
    _write(path, _step(1), _step(2), _step(3), {"kind": "resume", "step": 1})
    assert read_record(path) == [_step(1)]


@pytest.mark.parametrize(
    "event",
    [
        StepEvent(3, 1.5, 0.5, 1e-3, 0.1, 1000.0),
        EvalEvent(3, 2.5, 0.1),
        StopEvent(3, "finished"),
        StopEvent(3, "diverged", math.inf, 2.0),
        StopEvent(3, "interrupted", signal=2),
    ],
)
def test_typed_events_can_be_read_back(tmp_path, event):
    _write(tmp_path / "record.jsonl", to_record(event))
    assert from_record(read_record(tmp_path / "record.jsonl")[0]) == event


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"kind": 1, "step": 1}', "kind is not a string"),
        ('{"kind": ["step"], "step": 1}', "kind is not a string"),
        ('{"kind": "step", "step": "1"}', "step is not a whole number"),
        ('{"kind": "step", "step": -1}', "step is not a whole number"),
        ('{"kind": "step", "step": 1.5}', "step is not a whole number"),
        ('{"kind": "step", "step": true}', "step is not a number"),
        ('{"kind": "step", "step": 1, "loss": "low"}', "loss is not a number"),
        ('{"kind": "step", "step": 1, "loss": null}', "loss is not a number"),
        ('{"kind": "step", "step": 1, "clock": 3}', "clock is not an object"),
        ('{"kind": "step", "step": 1, "clock": {"seconds": []}}', "seconds is not a number"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_invalid_event_is_an_error_with_its_number(tmp_path, line, reason):
    path = tmp_path / "record.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n' + line + "\n")
    with pytest.raises(RunError, match=rf"Line 2 of .*{reason}"):
        read_record(path)


def test_name_of_a_new_record_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("omninorm.record.jsonl.sync_folder", synced.append, raising=False)
    for _ in range(2):
        Record(tmp_path / "record.jsonl").close()
    assert synced == [tmp_path]
