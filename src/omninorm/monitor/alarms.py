"""Runs the rules, deduplicates their alarms, and links consequences to their causes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omninorm.errors import ConfigError
from omninorm.monitor.arguments import COVERAGE
from omninorm.monitor.history import Evaluation, History, Sample, Step
from omninorm.monitor.rules import Rule, default_rules
from omninorm.record.alarm import SEVERITIES, Alarm, roots

CLEAR_STEPS, CLEAR_SAMPLES = 128, 10
"""An alarm may be raised again once its rule has not reported the layer for this many steps and samples."""
NEAR_STEPS, NEAR_SAMPLES = 10, 2
"""A warning explains alarms, and a cause explains earlier symptoms, within this many steps or samples."""
NAMED = 3
"""The number of other layers that a merged alarm lists by name."""


@dataclass
class _Raised:
    """The severity that was last raised for a layer, and the step at which its rule last reported it."""

    severity: int
    reported: int


class Judge:
    """Holds the rules of one run. Rules report for as long as something is wrong; the judge raises an alarm

    - the first time a rule reports a layer, and again when it gets more severe or returns after a clear period;
    - once for all layers, about the worst one, if a rule reports more layers than its `most_layers` (three);
    - with its cause, if another rule that explains it has an active alarm. If that is a "fail", it becomes a warning;
    - in order: fails before warnings, then in the order of the rules, which by default is causes before consequences.

    The losses of all steps are judged, but most causes are measured in samples. So a symptom, such as a loss spike, is
    often raised before its cause: `link` names the cause afterwards. While a `final` rule reports (a NaN or an
    infinity) no other alarm is raised, because the rest follows from it.

    Args:
        rules: the rules, with fresh state; None means `default_rules()`.

    Raises:
        ConfigError: an item of `rules` is not a Rule, or two rules have the same name.
    """

    def __init__(self, rules: Iterable[Rule] | None = None) -> None:
        if rules is not None and not isinstance(rules, Iterable):
            raise ConfigError(
                "rules must be a list of rules", type(rules).__name__, "for example, pass [*default_rules(), Mine()]"
            )
        self.rules = default_rules() if rules is None else list(rules)
        self._check_rules()
        self._order = {rule.name: place for place, rule in enumerate(self.rules)}
        self._raised: dict[str, dict[str | None, _Raised]] = {}
        self._active: dict[str, Alarm] = {}  # by rule: an alarm that may explain others, the first of the gravest ones
        self._symptoms: list[Alarm] = []  # the latest ones without a cause

    def judge_steps(self, history: History, new_steps: Sequence[Step]) -> list[Alarm]:
        """Return the alarms about steps that are new in the history, oldest first."""
        return [alarm for step in new_steps for alarm in self._judge_step(history, step)]

    def judge_sample(self, history: History) -> list[Alarm]:
        """Return the alarms about the history's newest sample. Judge the steps up to it first."""
        if not history.samples:
            return []
        sample = history.samples[-1]
        return self._raise(history, sample.step, "on_sample", sample)

    def judge_evaluation(self, history: History) -> list[Alarm]:
        """Return the alarms about the history's newest evaluation. Judge the steps up to it first."""
        newest = history.evaluations[-1]
        return self._raise(history, newest.step, "on_evaluation", newest)

    def link(self, history: History, alarms: Sequence[Alarm]) -> list[Alarm]:
        """Return alarms that are to be reported together, causes before consequences.

        A symptom among them gets its cause, if that is among them as well. If it has been reported already, the cause
        refers to it.
        """
        found = list(alarms)
        for place, cause in enumerate(found):
            if cause.cause is not None:
                continue
            explained = [each for each in (*self._symptoms, *found) if self._explains_symptom(history, cause, each)]
            for symptom in explained:
                linked = self._follow(symptom, cause)
                active = self._active.get(symptom.rule)
                if active is not None and active.ref == symptom.ref:
                    self._active[symptom.rule] = linked
                if symptom in found:
                    found[found.index(symptom)] = linked
            reported = [symptom.ref for symptom in explained if symptom in self._symptoms]
            self._symptoms = [symptom for symptom in self._symptoms if symptom not in explained]
            found[place] = replace(cause, explains=tuple(reported))
        new = [alarm for alarm in found if alarm.cause is None and self._is_symptom(alarm)]
        newest = history.steps[-1].step if history.steps else 0
        self._symptoms = [alarm for alarm in (*self._symptoms, *new) if newest - alarm.step <= _near(history)]
        return _causes_first(found)

    def _explains_symptom(self, history: History, cause: Alarm, alarm: Alarm) -> bool:
        """Return whether a symptom without a cause, raised shortly before `cause`, is its consequence."""
        near = 0 <= cause.step - alarm.step <= _near(history)
        return near and alarm.cause is None and self._is_symptom(alarm) and self._explains(cause, alarm.rule)

    def _is_symptom(self, alarm: Alarm) -> bool:
        rule = self._rule(alarm.rule)
        return alarm.rule == COVERAGE if rule is None else rule.symptom

    def _rule(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.name == name), None)

    def _judge_step(self, history: History, step: Step) -> list[Alarm]:
        return self._raise(history, step.step, "on_step", step)

    def bounds(self) -> dict[str, tuple[float | None, float | None]]:
        """Return the current bounds of the rules that have moving ones, by signal."""
        return {name: bounds for rule in self.rules for name, bounds in rule.bounds().items()}

    def _check_rules(self) -> None:
        for rule in self.rules:
            if not isinstance(rule, Rule):
                remedy = "derive it from omninorm.monitor.rules.Rule"
                raise ConfigError("Every item of rules must be an instance of Rule", repr(rule)[:80], remedy)
        names = [rule.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError("Every rule must have a unique name", f"{', '.join(twice)} more than once", "rename one")

    def _raise(self, history: History, step: int, method: str, given: Step | Sample | Evaluation) -> list[Alarm]:
        """Return the alarms of a method of the rules about what it is given."""
        clear = max(CLEAR_STEPS, CLEAR_SAMPLES * history.facts.every)
        alarms: list[Alarm] = []
        does_nothing = getattr(Rule, method)
        for rule in list(self.rules):
            if getattr(type(rule), method) is does_nothing and rule.name not in self._raised:
                continue
            reports = self._check(rule, getattr(rule, method), history, given)
            if not reports and rule.name not in self._raised:
                continue
            self._forget(rule, step - clear)
            reports = [self._attribute(history, rule, alarm) for alarm in reports[: 1 if rule.final else None]]
            raised = self._new_alarms(rule, step, reports)
            self._remember(rule, raised)
            alarms += raised
            if reports and rule.final:
                return alarms
        return sorted(
            alarms, key=lambda alarm: (-SEVERITIES.index(alarm.severity), self._order.get(alarm.rule, len(self._order)))
        )

    def _check(self, rule: Rule, check: Callable[..., Iterable[Alarm]], *arguments: Any) -> list[Alarm]:
        """Return a rule's reports. A rule that raises is disabled with a warning: monitoring must not end training."""
        try:
            return [_checked(alarm) for alarm in check(*arguments)]
        except Exception as error:
            self.rules = [other for other in self.rules if other is not rule]
            self._raised.pop(rule.name, None)
            self._active.pop(rule.name, None)  # it can no longer report whether it still explains others
            text = f"The rule {rule.name!r} failed and has been disabled: {type(error).__name__}: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return []

    def _attribute(self, history: History, rule: Rule, alarm: Alarm) -> Alarm:
        """Return the alarm with its cause, if an active one explains it: if possible, one without a cause of its own,
        and a "fail"."""
        active = [cause for cause in self._active.values() if self._is_active(history, cause, alarm)]
        causes = [cause for cause in active if self._explains(cause, rule.name)]
        return self._follow(alarm, min(causes, key=_rank)) if causes else alarm

    def _remember(self, rule: Rule, raised: Iterable[Alarm]) -> None:
        """Remember the alarm that is the likeliest cause of others."""
        for alarm in raised:
            known = self._active.get(rule.name)
            if known is None or _rank(alarm) < _rank(known):
                self._active[rule.name] = alarm

    def _explains(self, cause: Alarm, name: str) -> bool:
        """Return whether an alarm explains those of the rule `name`. If each rule explains the other, only a "fail"
        does."""
        rule, other = self._rule(cause.rule), self._rule(name)
        if rule is None or rule is other or name not in rule.explains:
            return False
        return cause.severity == "fail" or other is None or rule.name not in other.explains

    def _is_active(self, history: History, cause: Alarm, alarm: Alarm) -> bool:
        """Return whether an alarm can be the cause of a new one: a "fail" until it is forgotten, a warning while it is
        reported. A warning that has lasted longer does not explain a "fail", unless that is a symptom or the warning is
        about the model's structure."""
        reported = [state.reported for state in self._raised.get(cause.rule, {}).values()]
        rule = self._rule(cause.rule)
        lasting = alarm.severity == "warn" or self._is_symptom(alarm) or (rule is not None and rule.structural)
        since = max(reported, default=0) if lasting else cause.step
        return cause.severity == "fail" or since >= alarm.step - _near(history)

    def _follow(self, alarm: Alarm, cause: Alarm) -> Alarm:
        """Return the alarm as a consequence: a warning if the first cause is a "fail", except for the alarms of final
        rules, after which nothing can be trained."""
        rule = self._rule(alarm.rule)
        final = rule is not None and rule.final
        (root, *_) = roots([cause, *self._active.values()])
        severity = "warn" if root.severity == "fail" and not final else alarm.severity
        return replace(alarm, severity=severity, cause=cause.ref)

    def _forget(self, rule: Rule, before: int) -> None:
        """Drop the layers that the rule has not reported since step `before`."""
        raised = self._raised.get(rule.name, {})
        kept = {layer: state for layer, state in raised.items() if state.reported >= before}
        self._raised[rule.name] = kept
        cause, worst = self._active.get(rule.name), max((state.severity for state in kept.values()), default=-1)
        if cause is not None and worst < SEVERITIES.index(cause.severity):
            del self._active[rule.name]

    def _new_alarms(self, rule: Rule, step: int, reports: list[Alarm]) -> list[Alarm]:
        """Return the reports to be raised now, merged into one if they are many. Remember all of them."""
        raised = self._raised.setdefault(rule.name, {})
        new = [alarm for alarm in reports if self._is_news(raised.get(alarm.layer), alarm)]
        top = max((SEVERITIES.index(alarm.severity) for alarm in new), default=0)
        known = sum(state.severity >= top for state in raised.values())
        for alarm in reports:
            state = raised.setdefault(alarm.layer, _Raised(0, step))
            state.severity = max(state.severity, SEVERITIES.index(alarm.severity))
            state.reported = step
        if known > rule.most_layers:  # an alarm about many layers has been raised; a few more layers are not news
            return []
        return [_merge(new[0], new)] if new and len(reports) > rule.most_layers else new

    @staticmethod
    def _is_news(state: _Raised | None, alarm: Alarm) -> bool:
        return state is None or SEVERITIES.index(alarm.severity) > state.severity


def _near(history: History) -> int:
    return max(NEAR_STEPS, NEAR_SAMPLES * history.facts.every)


def _rank(cause: Alarm) -> tuple[bool, bool]:
    """Sort causes: those without a cause of their own first, then a "fail"."""
    return cause.cause is not None, cause.severity != "fail"


def _causes_first(alarms: list[Alarm]) -> list[Alarm]:
    """Return the alarms in their order, except that those with a cause among them come after it."""
    places = {alarm.ref: place for place, alarm in enumerate(alarms)}
    causes = [places[root.ref] for root in roots(alarms)]
    order = sorted(range(len(alarms)), key=lambda place: (max(place, causes[place]), place != causes[place], place))
    return [alarms[place] for place in order]


def _checked(alarm: Alarm) -> Alarm:
    if alarm.severity not in SEVERITIES:
        raise ValueError(f"An alarm's severity must be 'warn' or 'fail', got {alarm.severity!r}")
    return alarm


def _merge(worst: Alarm, new: Sequence[Alarm]) -> Alarm:
    """Return the worst layer's alarm, with the number of other new layers and some of their names."""
    others = list(dict.fromkeys(str(alarm.layer) for alarm in new if alarm.layer != worst.layer))
    if not others:
        return worst
    names = ", ".join(others[:NAMED]) + (", …" if len(others) > NAMED else ".")
    layers = "1 other layer" if len(others) == 1 else f"{len(others)} other layers"
    return replace(worst, evidence=f"{worst.evidence} Also affects {layers}: {names}")
