"""record.jsonl: whole lines, torn lines, and the story without its accidents."""

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


def test_events_are_lines_of_strict_json_and_come_back(tmp_path):
    path = tmp_path / "record.jsonl"
    event = {"kind": "diverged", "step": 3, "loss": math.nan, "clock": {"seconds": math.inf}}
    _write(path, _step(1), event)
    lines = path.read_text(encoding="utf-8").splitlines()
    # Strict readers refuse NaN; the value must survive all the same.
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] == "nan"
    back = read_history(path)
    assert back[0] == _step(1)
    assert math.isnan(back[1]["loss"])
    assert back[1]["clock"]["seconds"] == math.inf


@pytest.mark.parametrize("torn", [b'{"kind": "st', b'{"kind": "step", "step": 2, "loss": 1.0}', b"\xff\xfe", b"{"])
def test_a_torn_last_line_is_dropped_on_reading_and_cut_off_on_writing(tmp_path, torn):
    path = tmp_path / "record.jsonl"
    _write(path, _step(1))
    with open(path, "ab") as file:
        file.write(torn)
    assert read_history(path) == [_step(1)]
    _write(path, _step(2, 5.0))
    assert read_history(path) == [_step(1), _step(2, 5.0)]


def test_a_damaged_whole_line_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_bytes(b'{"kind": "step", "step": 1}\nnonsense\n{"kind": "step", "step": 2}\n')
    with pytest.raises(RunError, match=r"line 2 of .*delete that line"):
        read_record(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(RunError, match="line 1 of"):
        read_record(path)


def test_no_record_is_an_empty_one(tmp_path):
    assert read_record(tmp_path / "record.jsonl") == []


def test_a_resumed_story_reads_like_an_uninterrupted_one(tmp_path):
    straight, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    story = [{"kind": "eval", "step": 0, "bits_per_byte": 8.0}, *(_step(n, 1 / n) for n in range(1, 6))]
    end = {"kind": "finished", "step": 5}
    _write(straight, *story, end)
    first, second, third = story[:4], story[3:4], story[4:]
    accident = {"kind": "interrupted", "step": 3, "signal": 2}
    _write(broken, *first, {"kind": "resume", "step": 2}, *second, accident, {"kind": "resume", "step": 3}, *third, end)
    assert read_record(broken) == read_record(straight) == [*story, end]
    assert len(read_history(broken)) == 11


def test_what_a_killed_run_did_after_its_checkpoint_is_taken_back(tmp_path):
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
def test_events_survive_the_record(tmp_path, event):
    _write(tmp_path / "record.jsonl", to_record(event))
    assert from_record(read_record(tmp_path / "record.jsonl")[0]) == event


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"kind": 1, "step": 1}', "a kind that is no name"),
        ('{"kind": ["step"], "step": 1}', "a kind that is no name"),
        ('{"kind": "step", "step": "1"}', "a step that is no count"),
        ('{"kind": "step", "step": -1}', "a step that is no count"),
        ('{"kind": "step", "step": 1.5}', "a step that is no count"),
        ('{"kind": "step", "step": true}', "step is not a number"),
        ('{"kind": "step", "step": 1, "loss": "low"}', "loss is not a number"),
        ('{"kind": "step", "step": 1, "loss": null}', "loss is not a number"),
        ('{"kind": "step", "step": 1, "clock": 3}', "a clock without durations"),
        ('{"kind": "step", "step": 1, "clock": {"seconds": []}}', "seconds is not a number"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_an_event_of_another_shape_is_an_error_with_its_number(tmp_path, line, reason):
    path = tmp_path / "record.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n' + line + "\n")
    with pytest.raises(RunError, match=rf"line 2 of .*{reason}"):
        read_record(path)


def test_the_name_of_a_new_record_is_durable(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("omninorm.record.jsonl.sync_folder", synced.append, raising=False)
    for _ in range(2):
        Record(tmp_path / "record.jsonl").close()
    assert synced == [tmp_path]
