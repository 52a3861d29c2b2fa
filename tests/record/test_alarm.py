"""Alarms: equal after they have been written and read, whatever else a record holds."""

from __future__ import annotations

import json

import pytest

from omninorm.record.alarm import Alarm, AlarmRef

CAUSE = AlarmRef(3, "cause", "blocks.0")
PLAIN = Alarm(5, "fail", "rule", "blocks.1", "It was too large.", "Make it smaller.", "a paper")


@pytest.mark.parametrize(
    "alarm",
    [
        PLAIN,
        Alarm(5, "warn", "rule", None, "Evidence.", "", cause=CAUSE, explains=(AlarmRef(4, "effect"), CAUSE)),
    ],
)
def test_recorded_alarm_is_read_unchanged(alarm):
    stored = json.loads(json.dumps(alarm.to_record()))
    assert Alarm.from_record(stored, step=99) == alarm


def test_alarm_without_links_records_none():
    assert not {"cause", "explains"} & PLAIN.to_record().keys()


@pytest.mark.parametrize("step", [None, -1, 2**60, True, "5", 2.5])
def test_step_that_is_not_a_count_is_that_of_the_event(step):
    assert Alarm.from_record(PLAIN.to_record() | {"step": step}, step=99).step == 99


def test_values_of_the_wrong_type_are_replaced():
    stored = {"rule": [], "severity": 7, "layer": {}, "evidence": None, "cause": "x", "explains": [None, {"rule": "b"}]}
    assert Alarm.from_record(stored, step=2) == Alarm(2, "warn", "unnamed", None, "", "", explains=(AlarmRef(2, "b"),))


def test_linked_evidence_names_causes_and_consequences():
    alarm = Alarm(5, "warn", "rule", None, "Too large.", "", cause=CAUSE, explains=(AlarmRef(4, "effect"),))
    assert alarm.linked_evidence == (
        "Too large. Probably a consequence of cause in blocks.0 at step 3. It probably explains effect at step 4."
    )
