"""The judge: alarms are raised once, about the worst layer, causes before consequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from omninorm.errors import ConfigError
from omninorm.monitor import Alarm, Facts, History, Sample, Step
from omninorm.monitor.alarms import CLEAR_STEPS, Judge
from omninorm.monitor.rules import Rule
from omninorm.record.alarm import AlarmRef, leading, link


class Says(Rule):
    """Reports the given (severity, layer) pairs at each step."""

    name = "says"
    source = "a test"

    def __init__(
        self, plan: dict[int, list[tuple[str, str | None]]], name: str = "says", explains: tuple[str, ...] = ()
    ):
        self.plan, self.name, self.explains = plan, name, explains  # type: ignore[misc]

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        for severity, layer in self.plan.get(step.step, []):
            yield self.alarm(step.step, severity, layer, f"{self.name} at {layer}.", "Try this.")


def judge(*rules: Rule, steps: int = 400, every: int = 1) -> list[Alarm]:
    history, judge = History(facts=Facts(every=every)), Judge(rules)
    alarms = []
    for number in range(1, steps + 1):
        history.steps.append(Step(number, 3.0, 1.0, 1e-3))
        alarms += judge.judge_steps(history, [history.steps[-1]])
    return alarms


def short(alarms: list[Alarm]) -> list[tuple[int, str, str, str | None]]:
    return [(alarm.step, alarm.severity, alarm.rule, alarm.layer) for alarm in alarms]


def test_lasting_alarm_is_raised_once() -> None:
    plan = {step: [("warn", "a"), ("warn", "b")] for step in range(5, 300)}
    assert short(judge(Says(plan))) == [(5, "warn", "says", "a"), (5, "warn", "says", "b")]


def test_alarm_is_raised_again_if_it_gets_worse() -> None:
    plan = {1: [("warn", "a")], 2: [("fail", "a")], 3: [("warn", "a")], 4: [("fail", "a")]}
    assert short(judge(Says(plan))) == [(1, "warn", "says", "a"), (2, "fail", "says", "a")]


@pytest.mark.parametrize(
    ("pause", "every", "times"), [(CLEAR_STEPS, 1, 1), (CLEAR_STEPS + 1, 1, 2), (CLEAR_STEPS + 1, 20, 1)]
)
def test_alarm_is_raised_again_after_a_clear_period(pause: int, every: int, times: int) -> None:
    plan = {1: [("warn", "a")], 1 + pause: [("warn", "a")]}
    assert len(judge(Says(plan), every=every)) == times


def test_alarms_about_many_layers_are_merged_into_one_about_the_worst() -> None:
    three: list[tuple[str, str | None]] = [("warn", name) for name in "cab"]
    assert [alarm.layer for alarm in judge(Says({1: three}))] == ["c", "a", "b"]
    (alarm,) = judge(Says({1: [*three, ("warn", "d"), ("warn", "e")], 2: [("warn", "f"), ("warn", "a")]}))
    assert alarm.layer == "c"
    assert alarm.evidence == "says at c. Also affects 4 other layers: a, b, d, …"


def test_layers_that_join_one_by_one_raise_at_most_four_alarms() -> None:
    plan = {step: [("warn", f"layer {count}") for count in range(step)] for step in range(1, 30)}
    assert [alarm.step for alarm in judge(Says(plan))] == [1, 2, 3, 4]


def test_merged_alarm_is_raised_again_if_it_gets_worse() -> None:
    plan = {1: [("warn", name) for name in "abcdef"], 9: [("fail", name) for name in "bacdef"]}
    assert short(judge(Says(plan))) == [(1, "warn", "says", "a"), (9, "fail", "says", "b")]


def test_causes_come_first_and_consequences_are_warnings() -> None:
    cause = Says({5: [("fail", "a")]}, "cause", ("effect",))
    effect = Says({5: [("fail", "b")], 9: [("fail", "c")]}, "effect")
    other = Says({5: [("fail", None)]}, "other")
    alarms = judge(cause, effect, other)
    assert short(alarms) == [
        (5, "fail", "cause", "a"), (5, "fail", "other", None), (5, "warn", "effect", "b"), (9, "warn", "effect", "c"),
    ]  # fmt: skip
    assert [alarm.cause for alarm in alarms] == [None, None, AlarmRef(5, "cause", "a"), AlarmRef(5, "cause", "a")]
    assert alarms[2].linked_evidence == "effect at b. Probably a consequence of cause in a at step 5."


def test_later_alarm_does_not_explain_an_earlier_one() -> None:
    cause = Says({9: [("fail", "a")]}, "cause", ("effect",))
    effect = Says({5: [("fail", "b")]}, "effect", ("cause",))
    assert short(judge(cause, effect)) == [(5, "fail", "effect", "b"), (9, "warn", "cause", "a")]


@pytest.mark.parametrize(("severity", "last"), [("fail", "warn"), ("warn", "fail")])
def test_consequence_explains_others_with_the_severity_of_its_own_cause(severity: str, last: str) -> None:
    cause, effect = Says({5: [(severity, "a")]}, "cause", ("effect",)), Says({6: [("fail", "b")]}, "effect", ("other",))
    alarms = judge(cause, effect, Says({7: [("fail", "c")]}, "other"))
    assert [alarm.cause for alarm in alarms] == [None, alarms[0].ref, alarms[1].ref]
    assert alarms[2].severity == last
    assert leading(alarms) is alarms[0]


def test_cause_of_its_own_is_preferred_to_a_consequence() -> None:
    effect = Says({6: [("fail", "b")]}, "effect", ("other",))
    cause = Says({5: [("fail", "a")]}, "cause", ("effect", "other"))
    alarms = judge(effect, cause, Says({7: [("fail", "c")]}, "other"))
    assert [alarm.cause for alarm in alarms] == [None, alarms[0].ref, alarms[0].ref]


def test_rule_does_not_explain_itself() -> None:
    alarms = judge(Says({1: [("fail", "a")], 2: [("fail", "b")]}, "says", ("says",)))
    assert short(alarms) == [(1, "fail", "says", "a"), (2, "fail", "says", "b")]


def test_warning_explains_nothing_and_a_cause_expires() -> None:
    cause = Says({1: [("warn", "a")], 10: [("fail", "a")]}, "cause", ("effect",))
    effect = Says({5: [("fail", "b")], 12: [("fail", "c")], 300: [("fail", "d")]}, "effect")
    assert [(alarm.layer, alarm.severity) for alarm in judge(cause, effect) if alarm.rule == "effect"] == [
        ("b", "fail"), ("c", "warn"), ("d", "fail"),
    ]  # fmt: skip


@pytest.mark.parametrize("structural", [True, False])
def test_lasting_warning_about_the_structure_explains_a_later_failure(structural: bool) -> None:
    cause = Says({step: [("warn", "a")] for step in range(1, 60)}, "cause", ("effect",))
    cause.structural = structural  # type: ignore[misc]
    effect = Says({50: [("fail", "b")]}, "effect")
    alarms = judge(cause, effect)
    assert short(alarms) == [(1, "warn", "cause", "a"), (50, "fail", "effect", "b")]
    assert alarms[1].cause == (AlarmRef(1, "cause", "a") if structural else None)
    assert leading(alarms) is alarms[0 if structural else 1]


def test_alarm_in_the_name_of_another_rule_is_reported_last() -> None:
    class Foreign(Says):
        def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
            for alarm in super().on_step(history, step):
                yield replace(alarm, rule="somebody's")

    alarms = judge(Foreign({1: [("warn", "a")]}, "foreign"), Says({1: [("warn", "b")]}))
    assert short(alarms) == [(1, "warn", "says", "b"), (1, "warn", "somebody's", "a")]


def test_final_rule_suppresses_other_alarms_while_it_reports() -> None:
    last = Says({5: [("fail", "a"), ("fail", "b")], 6: [("fail", "a")], 7: [("fail", "a")]}, "last")
    last.final = True  # type: ignore[misc]
    other = Says({5: [("fail", "x")], 7: [("fail", "y")], 8: [("fail", "z")]}, "other")
    assert short(judge(last, other)) == [(5, "fail", "last", "a"), (8, "fail", "other", "z")]


def test_merged_alarm_counts_only_new_layers() -> None:
    two: list[tuple[str, str | None]] = [("warn", "a"), ("warn", "b")]
    alarms = judge(Says({1: two, 2: [("warn", name) for name in "abcde"]}))
    assert short(alarms[2:]) == [(2, "warn", "says", "c")]
    assert alarms[2].evidence == "says at c. Also affects 2 other layers: d, e."
    mixed = judge(Says({1: [("warn", "a")], 2: [("warn", "a"), ("warn", "b"), ("warn", "a"), ("warn", "c")]}))
    assert mixed[1].evidence == "says at b. Also affects 1 other layer: c."


def test_rule_that_raises_is_disabled_with_a_warning() -> None:
    class Broken(Rule):
        name = "broken"

        def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
            return [self.alarm(sample.step, "warn", None, str(1 / 0), "")]

    history = History()
    judge = Judge([Broken(), Says({})])
    history.samples.append(Sample(1, {}))
    with pytest.warns(RuntimeWarning, match="'broken' failed.*disabled: ZeroDivisionError"):
        assert judge.judge_sample(history) == []
    assert judge.judge_sample(history) == []
    assert [rule.name for rule in judge.rules] == ["says"]


def test_history_without_samples_raises_no_alarm() -> None:
    assert Judge().judge_sample(History()) == []


def test_items_that_are_no_rules_and_duplicate_names_are_refused() -> None:
    with pytest.raises(ConfigError) as no_rule:
        Judge([Says])  # type: ignore[list-item]
    assert "Says" in no_rule.value.received
    with pytest.raises(ConfigError) as duplicate:
        Judge([Says({}), Says({})])
    assert duplicate.value.received == "says more than once"
    with pytest.raises(ConfigError) as no_list:
        Judge(7)  # type: ignore[arg-type]
    assert no_list.value.received == "int"
    assert Judge([]).judge_sample(History()) == []


def test_unknown_severity_disables_the_rule() -> None:
    with pytest.warns(RuntimeWarning, match="'warn' or 'fail'"):
        assert judge(Says({1: [("panic", None)]})) == []


class Breaks(Says):
    """Fails in the second step with an error of its own."""

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        if step.step == 2:
            raise ZeroDivisionError
        yield from super().on_step(history, step)


@pytest.mark.filterwarnings("ignore:The rule 'cause' failed")
def test_disabled_rule_is_no_longer_a_cause() -> None:
    cause = Breaks({1: [("fail", "a")]}, name="cause", explains=("other",))
    assert short(judge(cause, Says({3: [("fail", "b")]}, name="other"))) == [
        (1, "fail", "cause", "a"),
        (3, "fail", "other", "b"),
    ]


# Links ----------------------------------------------------------------------------------------------------------------


def reported(*rules: Rule, steps: int = 100, every: int = 10) -> list[Alarm]:
    """Return the alarms as a watch reports them: those of `every` steps at a time, linked."""
    history, judge, alarms = History(facts=Facts(every=every)), Judge(rules), list[Alarm]()
    for last in range(every, steps + 1, every):
        history.steps.extend(Step(number, 3.0, 1.0, 1e-3) for number in range(last - every + 1, last + 1))
        found = judge.judge_steps(history, list(history.steps)[-every:])
        alarms = link([*alarms, *judge.link(history, found)])
    return alarms


def symptom(step: int, severity: str = "warn", name: str = "effect", explains: tuple[str, ...] = ()) -> Says:
    rule = Says({step: [(severity, None)]}, name, explains)
    rule.symptom = True  # type: ignore[misc]
    return rule


def test_symptom_follows_from_a_cause_of_the_same_report() -> None:
    alarms = reported(Says({30: [("fail", "a")]}, "cause", ("effect",)), symptom(23, "fail"))
    assert short(alarms) == [(30, "fail", "cause", "a"), (23, "warn", "effect", None)]
    assert alarms[1].cause == alarms[0].ref
    assert not alarms[0].explains, "the consequence names its cause itself"


@pytest.mark.parametrize(("step", "linked"), [(40, True), (43, True), (44, False)])
def test_symptom_that_was_reported_follows_from_a_cause_of_the_next_two_samples(step: int, linked: bool) -> None:
    alarms = reported(Says({step: [("fail", "a")]}, "cause", ("effect",)), symptom(23))
    assert short(alarms) == [(23, "warn", "effect", None), (step, "fail", "cause", "a")]
    assert alarms[0].cause == (alarms[1].ref if linked else None)
    assert ("It probably explains effect at step 23." in alarms[1].linked_evidence) == linked


def test_only_symptoms_follow_from_a_later_alarm() -> None:
    alarms = reported(Says({30: [("fail", "a")]}, "cause", ("effect",)), Says({23: [("warn", "b")]}, "effect"))
    assert [alarm.cause for alarm in alarms] == [None, None]
    assert [alarm.step for alarm in alarms] == [23, 30]


def test_symptoms_of_a_symptom_come_after_the_cause_of_both() -> None:
    spike = symptom(23, name="spike", explains=("effect",))
    alarms = reported(Says({30: [("warn", "a")]}, "cause", ("spike",)), spike, symptom(25))
    assert [alarm.rule for alarm in alarms] == ["cause", "spike", "effect"]
    assert [alarm.cause for alarm in alarms] == [None, alarms[0].ref, alarms[1].ref]
    assert leading(alarms) is alarms[0]


def test_active_warning_is_a_cause_but_leaves_a_failure_its_severity() -> None:
    cause = Says({step: [("warn", "a")] for step in range(20, 31)}, "cause", ("effect",))
    alarms = reported(cause, Says({40: [("fail", "b")], 41: [("fail", "c")]}, "effect"))
    assert short(alarms) == [(20, "warn", "cause", "a"), (40, "fail", "effect", "b"), (41, "fail", "effect", "c")]
    assert [alarm.cause for alarm in alarms] == [None, alarms[0].ref, None], (
        "it was raised more than two samples before"
    )
    assert leading(alarms) is alarms[0]


@pytest.mark.parametrize(("severity", "is_symptom"), [("warn", False), ("fail", True), ("fail", False)])
def test_lasting_warning_explains_warnings_and_symptoms_but_no_other_failure(severity: str, is_symptom: bool) -> None:
    cause = Says({step: [("warn", "a")] for step in range(10, 100)}, "cause", ("effect",))
    effect = Says({80: [(severity, "b")]}, "effect")
    effect.symptom = is_symptom  # type: ignore[misc]
    alarms = reported(cause, effect)
    assert alarms[1].cause == (None if severity == "fail" and not is_symptom else alarms[0].ref)


def test_warning_does_not_explain_an_alarm_that_can_explain_it() -> None:
    first = Says({20: [("warn", "a")]}, "first", ("second",))
    alarms = reported(first, Says({25: [("fail", "b")]}, "second", ("first",)))
    assert [alarm.cause for alarm in alarms] == [None, None]
    assert leading(alarms) is alarms[1]


def test_final_alarm_with_a_cause_stays_a_failure() -> None:
    last = Says({25: [("fail", "b")]}, "last")
    last.final = True  # type: ignore[misc]
    alarms = reported(Says({20: [("fail", "a")]}, "cause", ("last",)), last)
    assert short(alarms) == [(20, "fail", "cause", "a"), (25, "fail", "last", "b")]
    assert alarms[1].cause == alarms[0].ref
    assert leading(alarms) is alarms[0]


def test_leading_alarm_is_what_the_first_failure_follows_from() -> None:
    def alarm(step: int, severity: str, rule: str, cause: AlarmRef | None = None) -> Alarm:
        return Alarm(step, severity, rule, None, "", "", cause=cause)

    warning, root = alarm(3, "warn", "early"), alarm(9, "warn", "root")
    follows = alarm(5, "fail", "effect", root.ref)
    assert leading([warning, root, alarm(7, "fail", "other"), follows]) is root
    assert leading([warning, root]) is warning
    assert leading([alarm(5, "fail", "effect", AlarmRef(4, "unknown"))]).rule == "effect"  # type: ignore[union-attr]
    assert leading([]) is None


def test_alarm_whose_cause_has_expired_is_named_with_the_step_at_which_it_was_raised() -> None:
    """It is reported all the time, first as a consequence; later alarms must refer to one that was raised."""
    cause = Says({5: [("fail", None)]}, "cause", ("effect",))
    effect = Says({step: [("warn", "a")] for step in range(6, 300)}, "effect", ("other",))
    alarms = judge(cause, effect, Says({250: [("warn", "b")]}, "other"))
    refs = {alarm.ref for alarm in alarms}
    assert [alarm.rule for alarm in alarms] == ["cause", "effect", "other"]
    assert all(alarm.cause is None or alarm.cause in refs for alarm in alarms)
