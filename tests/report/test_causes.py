"""causes: one entry per rule and cause, with its layers; consequences below their cause."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from helpers.stories import alarm, story_of

from omninorm.record.alarm import AlarmRef
from omninorm.report import render
from omninorm.report.causes import causes
from omninorm.report.entries import MOST_LAYERS, alarm_entries


def logits(step, block, severity="warn"):
    layer = f"blocks.{block}"
    evidence = f"Attention logits too large: the largest in {layer} is {step}."
    return alarm(step, severity, layer, rule="attention-logits", evidence=evidence, remedy="Use qk-norm.")


def follower(step, cause, layer="blocks.1", rule="dead-units", severity="warn"):
    evidence = f"{step} % of the hidden units in {layer} are 0."
    return alarm(step, severity, layer, rule=rule, evidence=evidence, remedy="Wait.", cause=cause)


def test_alarms_about_several_layers_are_one_entry_with_its_first_step_and_gravest_severity():
    alarms = [logits(10, 3), logits(20, 5), logits(30, 3, "fail"), logits(40, 7)]
    (cause,) = causes(alarms)
    assert (cause.first, cause.last, cause.severity) == (10, 40, "fail")
    assert cause.lead is alarms[2]
    assert [(number, found.layer, found.severity) for number, found in cause.layers] == [
        (2, "blocks.3", "fail"), (1, "blocks.5", "warn"), (3, "blocks.7", "warn"),
    ]  # fmt: skip
    entries = alarm_entries(alarms)
    assert entries.count("Use qk-norm.") == 1
    assert entries.count("<h3>") == 1
    assert "from step 10, last raised at step 40" in entries
    for layer in ("blocks.3", "blocks.5", "blocks.7"):
        assert f">{layer}</button>" in entries


def test_consequences_are_below_their_cause():
    root = alarm(9, "fail", None, rule="learning-rate", evidence="Learning rate 9 times too high: it is 0.1.")
    other = alarm(9, "fail", None, rule="no-norm", evidence="No norms: the stream explodes.")
    first, last = follower(10, root.ref), follower(12, other.ref, rule="depth-growth")
    alarms = [root, first, other, last, follower(13, last.ref, rule="adam-eps")]
    found = causes(alarms)
    assert [(cause.rule, [each.rule for each in cause.consequences]) for cause in found] == [
        ("learning-rate", ["dead-units"]), ("no-norm", ["depth-growth", "adam-eps"]),
    ]  # fmt: skip
    assert found[0].consequences[0].evidence == "10 % of the hidden units in blocks.1 are 0."
    entries = alarm_entries(alarms)
    assert "Probably a consequence" not in entries, "the list shows it by its nesting"
    assert entries.index("Learning rate 9") < entries.index("10 % of the hidden") < entries.index("No norms")


def test_warning_whose_consequence_is_a_failure_comes_before_earlier_causes_without_one():
    root, other = alarm(9, "warn", rule="layer-jump"), alarm(3, "warn", rule="other")
    assert [cause.rule for cause in causes([other, root, follower(10, root.ref, severity="fail")])] == [
        "layer-jump", "other",
    ]  # fmt: skip


def test_consequence_of_an_alarm_that_is_not_listed_stays_an_entry():
    (cause,) = causes([follower(10, AlarmRef(9, "learning-rate"))])
    assert cause.rule == "dead-units"
    assert cause.parent is None


def test_consequences_of_each_other_are_all_listed():
    """Only a damaged record has a circle; no alarm may disappear."""
    alarms = [
        follower(10, AlarmRef(11, "b", "blocks.1"), rule="a"),
        follower(11, AlarmRef(10, "a", "blocks.1"), rule="b"),
    ]
    assert sum(1 + len(cause.consequences) for cause in causes(alarms)) == 2


@pytest.mark.parametrize(
    ("evidence", "entries"),
    [
        (("Unusual batch: the loss is 5.", "Learning rate jumped 3-fold: the loss is 6."), 2),
        (("Loss high for 5 steps: it rose.", "Loss high for 65 steps: it rose."), 1),
        (("the loss is 5.1", "the loss is 6.1"), 1),
    ],
)
def test_causes_of_one_rule_are_told_apart_by_their_words_not_their_numbers(evidence, entries):
    alarms = [alarm(step, "warn", None, evidence=text) for step, text in enumerate(evidence)]
    assert len(causes(alarms)) == entries


def test_failures_come_before_earlier_warnings():
    alarms = [alarm(3, "warn", None, rule="first"), alarm(9, "fail", None, rule="second")]
    assert [cause.rule for cause in causes(alarms)] == ["second", "first"]


def test_entry_names_a_limited_number_of_layers():
    entries = alarm_entries([logits(step, step) for step in range(MOST_LAYERS + 5)])
    assert entries.count('<li><button type="button" class="show"') == MOST_LAYERS
    assert "and 5 more" in entries


def test_page_has_the_alarms_before_the_facts_and_quotes_the_lead_once(tmp_path):
    story = replace(story_of(tmp_path, scene="logits"), alarms=[logits(10, 3, "fail"), logits(20, 5)])
    page = render(story)
    assert page.index("<h1>Failing") < page.index('id="alarms-title"') < page.index('id="facts-title"')
    above = page[: page.index("All alarms by step")]
    assert len(re.findall("he largest in blocks.3 is 10", above)) == 1
