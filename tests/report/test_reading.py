"""read_run: complete, truncated, damaged, resumed and newer records, and records of several ranks."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from helpers import synthetic_run as synthetic

from omninorm.errors import RunError
from omninorm.record import Record
from omninorm.report import read_run
from omninorm.report.reading import choose


def write(folder, *events, name="record.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder / name)
    for event in events:
        record.append(event)
    record.close()
    return folder


HEAD = synthetic.head(2, 1, "blocks", "healthy")


def sample(step, value=1.0):
    return {"kind": "sample", "step": step, "signals": {"stream_rms": [value, None], "logz": [value]}, "worst": {}}


def chunk(step, first, losses):
    return {"kind": "steps", "step": step, "first": first, "loss": losses, "grad_norm": [None] * len(losses), "lr": []}


def warning(step, layer="blocks.1", severity="warn"):
    return {
        "kind": "alarms",
        "step": step,
        "alarms": [synthetic.alarm(step, severity, "rule", layer, "too much", "less", "")],
    }


def test_watched_run_is_read(tmp_path):
    story = read_run(synthetic.run(tmp_path, blocks=3, samples=5, every=4, scene="logits"))
    assert story.watched.model == "Thinker"
    assert [norm.block for norm in story.watched.norms] == [0, 0, 1, 1, 2, 2, None]
    assert story.placement == "pre"
    assert story.not_seen["saturation"] == "no norm of the model is a DyT or Derf"
    assert story.series["loss"].steps == list(range(1, 21))
    assert [column.step for column in story.columns] == [4, 8, 12, 16, 20]
    assert len(story.columns[0].signals["gain_max"]) == 7
    assert story.samples == 5
    assert story.ending.status == "done"
    assert (story.first_step, story.last_step) == (1, 20)
    assert len(story.worst["adam_ratio"]) == 6
    assert story.notes == []
    assert read_run(tmp_path / "record.jsonl").columns == story.columns


def test_trained_run_is_read_with_and_without_monitoring(tmp_path):
    bare = read_run(synthetic.run(tmp_path / "bare", samples=3, every=2, kinds="train"))
    assert bare.watched is None
    assert bare.series["loss"].steps == bare.series["lr"].steps == list(range(1, 7))
    assert bare.evals.steps == [0, 2, 4, 6]
    assert bare.tokens_per_second == 40_000
    assert bare.ending.status == "finished"
    both = read_run(synthetic.run(tmp_path / "both", samples=3, every=2, kinds="both"))
    assert both.watched is not None
    assert both.series == bare.series
    assert both.samples == 3


def test_nonfinite_values_are_kept_and_missing_ones_left_out(tmp_path):
    events = [HEAD, chunk(3, 1, [1.0, None, math.nan]), sample(3, -math.inf), sample(4, math.nan)]
    bad = {"kind": "nonfinite", "step": 3, "phase": "backward", "layer": "blocks.0.w", "value": "inf"}
    story = read_run(write(tmp_path, *events, bad))
    assert story.series["loss"].steps == [1, 3]
    assert math.isnan(story.series["loss"].values[1])
    assert story.series["grad_norm"].steps == []
    assert story.columns[0].signals == {"stream_rms": [-math.inf, None], "logz": [-math.inf]}
    assert math.isnan(story.columns[1].signals["logz"][0])
    assert (story.bad[0].phase, story.bad[0].layer, story.bad[0].value) == ("backward", "blocks.0.w", "inf")


def test_resume_discards_later_events(tmp_path):
    events = [
        HEAD, chunk(4, 1, [1.0, 2.0, 3.0, 4.0]), sample(2), sample(4, 9.0), warning(2), warning(4),
        {"kind": "nonfinite", "step": 4, "phase": "loss", "layer": None, "value": "nan"},
        {"kind": "end", "step": 4, "reason": "KeyError: 'x'"},
        {"kind": "resume", "step": 3},
        {**HEAD, "step": 3}, chunk(5, 4, [40.0, 50.0]), sample(5),
    ]  # fmt: skip
    story = read_run(write(tmp_path, *events))
    assert story.series["loss"].values == [1.0, 2.0, 3.0, 40.0, 50.0]
    assert [column.step for column in story.columns] == [2, 5]
    assert [alarm.step for alarm in story.alarms] == [2]
    assert story.bad == []
    assert story.ending.status == "open"
    assert story.notes == []


def test_second_run_in_the_same_record_replaces_the_first(tmp_path):
    story = read_run(write(tmp_path, HEAD, sample(1), sample(9), warning(9), HEAD, sample(1, 5.0)))
    assert [(column.step, column.signals["logz"]) for column in story.columns] == [(1, [5.0])]
    assert story.alarms == []
    assert story.notes == ["An earlier run of 9 steps in this record is not shown."]


def test_only_a_restart_is_noted_as_an_earlier_run(tmp_path):
    again = [{"kind": "resume", "step": 0}, HEAD, chunk(1, 1, [5.0])]
    story = read_run(write(tmp_path / "again", HEAD, chunk(3, 1, [1.0, 2.0, 3.0]), sample(2), *again))
    assert story.series["loss"].values == [5.0]
    assert story.notes == ["An earlier run of 3 steps in this record is not shown."]
    assert read_run(write(tmp_path / "new", *again)).notes == []
    later = [{**HEAD, "step": 2}, chunk(3, 3, [7.0])]
    story = read_run(write(tmp_path / "later", HEAD, chunk(3, 1, [1.0, 2.0, 3.0]), *later))
    assert story.notes == ["An earlier run beyond step 2 in this record is not shown."]


def test_incomplete_last_line_is_ignored_and_damaged_lines_are_counted(tmp_path):
    folder = write(tmp_path, HEAD, sample(1), sample(2), sample(3), chunk(3, 1, [1.0, 2.0, 3.0]))
    path = folder / "record.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    # A truncated line, two merged lines, zeros, no JSON, no event, a blank line; then an incomplete last line.
    half = lines[1][: len(lines[1]) // 2]
    damage = [
        half + b"\n",
        half + lines[1],
        b"\0" * 40 + b"\n",
        b"\xff\xfe{\n",
        b"[]\n",
        b'{"kind": "step", "step": -1}\n',
        b"\n",
    ]
    path.write_bytes(b"".join([lines[0], *damage, *lines[2:], sample_bytes(4)[:-9]]))
    story = read_run(folder)
    assert [column.step for column in story.columns] == [2, 3]
    assert story.samples == 2
    assert story.notes == ["Skipped 6 damaged lines of record.jsonl."]


def sample_bytes(step):
    return json.dumps(sample(step)).encode() + b"\n"


def test_damage_inside_a_sample_is_noticed_when_it_is_parsed(tmp_path):
    folder = write(tmp_path, HEAD, sample(1), sample(2))
    path = folder / "record.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"stream_rms": [1.0', b'{"stream_rms": [1.0.0', 1))
    story = read_run(folder)
    assert [column.step for column in story.columns] == [2]
    assert story.samples == 1
    assert story.notes == ["Skipped 1 damaged line of record.jsonl."]


@pytest.mark.parametrize(
    ("event", "check"),
    [
        ({"kind": "alarms", "step": 2, "alarms": "many"}, lambda story: story.alarms == []),
        ({"kind": "alarms", "step": 2, "alarms": [None, 7, {"rule": []}]}, lambda story: story.alarms[0].rule == "unnamed"),
        ({"kind": "seen", "step": 2, "placement": 3, "not_seen": ["x"]}, lambda story: story.placement is None),
        ({"kind": "sample", "step": 2, "signals": {"logz": 3}}, lambda story: len(story.columns) == 1),
        ({"kind": "sample", "step": 2, "signals": []}, lambda story: story.columns[-1].signals == {}),
        ({"kind": "sample", "step": 2, "signals": {"new_signal": [1]}}, lambda story: story.columns[-1].signals == {}),
        ({"kind": "steps", "step": 2, "first": "a", "loss": [1]}, lambda story: story.series["loss"].steps == []),
        ({"kind": "steps", "step": 2, "first": 2, "loss": [10**400]}, lambda story: story.series["loss"].values == [math.inf]),
        ({"kind": "of-tomorrow", "step": 2}, lambda story: story.notes == []),
        ({"kind": "__init__", "step": 2}, lambda story: story.notes == []),
        ({**HEAD, "blocks": 7, "norms": {"a": 1}, "groups": [None], "versions": [], "parameters": "x"}, lambda story: story.watched.names("group") == ["?"]),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_ignored(tmp_path, event, check):
    assert check(read_run(write(tmp_path, HEAD, sample(1), event)))


def test_lists_of_the_wrong_length_are_fitted_with_a_note(tmp_path):
    wrong = {"kind": "sample", "step": 1, "signals": {"stream_rms": [1.0, 2.0, 3.0], "angle": [0.5]}}
    story = read_run(write(tmp_path, HEAD, wrong))
    assert story.columns[0].signals == {"stream_rms": [1.0, 2.0], "angle": [0.5, None]}
    assert "2 lists" in story.notes[0]


def test_record_without_its_first_line_has_numbered_layers(tmp_path):
    story = read_run(write(tmp_path, sample(1)))
    assert story.watched.names("block") == ["block 0", "block 1"]
    assert story.columns[0].signals["stream_rms"] == [1.0, None]


def test_records_of_all_ranks_are_merged(tmp_path):
    write(tmp_path, {**HEAD, "world_size": 3}, sample(1), warning(1))
    write(tmp_path, HEAD, warning(1), warning(2, "blocks.0"), name="record-rank1.jsonl")
    write(
        tmp_path,
        HEAD,
        warning(1),
        {"kind": "nonfinite", "step": 2, "phase": "loss", "layer": None, "value": "nan"},
        name="record-rank2.jsonl",
    )
    story = read_run(tmp_path)
    assert [(alarm.step, alarm.layer, alarm.ranks) for alarm in story.alarms] == [
        (1, "blocks.1", (0, 1, 2)),
        (2, "blocks.0", (1,)),
    ]
    assert [bad.rank for bad in story.bad] == [2]
    assert any("also read: 1, 2" in note for note in story.notes)


def test_records_of_ranks_that_only_an_earlier_run_had_are_not_read(tmp_path):
    write(tmp_path, {**HEAD, "world_size": 2}, sample(1), warning(1))
    for rank in (1, 2, 3):
        write(tmp_path, HEAD, warning(1), name=f"record-rank{rank}.jsonl")
    story = read_run(tmp_path)
    assert [alarm.ranks for alarm in story.alarms] == [(0, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no record.jsonl"),
        (b"", "has no events"),
        (b'{"kind": "watch", "st', "has no events"),
        (b"\0\0\0\n", "is not a record"),
        (b"Dear diary,\ntoday", "is not a record"),
        (b"a text without a line's end", "is not a record"),
        (b'{"loss": 3.0}\n', "is not a record"),
        (json.dumps({**HEAD, "format": 2}).encode() + b"\n", "format 2"),
    ],
)
def test_file_that_is_no_record_is_an_error_with_its_path_and_a_remedy(tmp_path, content, message):
    if content is not None:
        (tmp_path / "record.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=message) as error:
        read_run(tmp_path)
    assert str(tmp_path) in error.value.invariant
    assert error.value.remedy


@pytest.mark.parametrize("name", ["nowhere", "a\0b"])
def test_missing_folder_is_an_error(tmp_path, name):
    with pytest.raises(RunError, match="No such file or folder"):
        read_run(tmp_path / name)


def test_damaged_config_is_noted(tmp_path):
    folder = write(tmp_path, HEAD, sample(1))
    (folder / "config.json").write_text("{")
    assert "config.json" in read_run(folder).notes[0]
    (folder / "config.json").write_text('{"train": {"lr": 1}}')
    assert read_run(folder).config == {"train": {"lr": 1}}


def test_samples_are_thinned_except_those_at_alarms(tmp_path):
    count = 2000
    folder = write(
        tmp_path, HEAD, *(sample(step) for step in range(1, count + 1)), warning(777), warning(1234, severity="fail")
    )
    story = read_run(folder)
    shown = [column.step for column in story.columns]
    assert story.samples == count
    assert len(shown) <= 500
    assert {1, 777, 1234, count} <= set(shown)
    gaps = {after - before for before, after in pairwise(shown)}
    assert max(gaps) == 5
    assert len(shown) == 1 + 400 + 2, "the first, every fifth from the newest back, and the two at alarms"


@pytest.mark.parametrize("limit", [8, 50, 800])
def test_choose_respects_its_limit(limit):
    steps = list(range(10, 100_010, 10))
    for events in ((), (55, 50_000), range(0, 200_000, 7)):
        chosen = choose(steps, events, limit)
        assert len(chosen) <= limit
        assert chosen == sorted(set(chosen))
        assert {10, 100_000} <= set(chosen)
    # An event between two samples is in the later one.
    assert 60 in choose(steps, (55,), limit)


def test_merged_lines_of_samples_are_noticed_without_parsing_them(tmp_path):
    lines = [json.dumps(HEAD).encode() + b"\n", *(sample_bytes(step) for step in range(1, 1001))]
    # Every third is shown, from the newest back, so not 999.
    lines[999] = lines[999][:40] + lines[999]
    (tmp_path / "record.jsonl").write_bytes(b"".join(lines))
    story = read_run(tmp_path)
    assert story.samples == 999
    assert "1 damaged line" in story.notes[0]
