"""Runs the rules and deduplicates their alarms, causes before consequences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from omninorm.errors import ConfigError
from omninorm.monitor.alarm import SEVERITIES, Alarm
from omninorm.monitor.history import History, Step
from omninorm.monitor.rules import Rule, default_rules

CLEAR_STEPS, CLEAR_SAMPLES = 128, 10
"""An alarm may be raised again once its rule has not reported the layer for this many steps and samples."""
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
    - as a warning that names the cause, if another rule that explains it has an active "fail";
    - in order: fails before warnings, then in the order of the rules, which by default is causes before consequences.

    While a `final` rule reports (a NaN or an infinity) no other alarm is raised, because the rest follows from it.

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
        self._standing: dict[str, tuple[Rule, Alarm]] = {}  # active fails that no other active fail explains

    def judge_steps(self, history: History, new_steps: Sequence[Step]) -> list[Alarm]:
        """Return the alarms about steps that are new in the history, oldest first."""
        return [alarm for step in new_steps for alarm in self._judge_step(history, step)]

    def judge_sample(self, history: History) -> list[Alarm]:
        """Return the alarms about the history's newest sample. Judge the steps up to it first."""
        if not history.samples:
            return []
        sample = history.samples[-1]
        return self._raise(history, sample.step, lambda rule: rule.on_sample(history, sample))

    def judge_evaluation(self, history: History) -> list[Alarm]:
        """Return the alarms about the history's newest evaluation. Judge the steps up to it first."""
        newest = history.evaluations[-1]
        return self._raise(history, newest.step, lambda rule: rule.on_evaluation(history, newest))

    def _judge_step(self, history: History, step: Step) -> list[Alarm]:
        return self._raise(history, step.step, lambda rule: rule.on_step(history, step))

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

    def _raise(self, history: History, step: int, check: Callable[[Rule], Iterable[Alarm]]) -> list[Alarm]:
        clear = max(CLEAR_STEPS, CLEAR_SAMPLES * history.facts.every)
        alarms: list[Alarm] = []
        for rule in list(self.rules):
            reports = self._check(rule, check)
            if reports and rule.final:
                self._forget(rule, step - clear)
                return [*alarms, *self._new_alarms(rule, step, reports[:1])]
            if reports or rule.name in self._raised:
                self._forget(rule, step - clear)
                alarms += self._new_alarms(rule, step, [self._attribute(rule, alarm) for alarm in reports])
        return sorted(alarms, key=lambda alarm: (-SEVERITIES.index(alarm.severity), self._order[alarm.rule]))

    def _check(self, rule: Rule, check: Callable[[Rule], Iterable[Alarm]]) -> list[Alarm]:
        """Return a rule's reports. A rule that raises is disabled with a warning: monitoring must not end training."""
        try:
            return [_checked(alarm) for alarm in check(rule)]
        except Exception as error:
            self.rules = [other for other in self.rules if other is not rule]
            self._raised.pop(rule.name, None)
            self._standing.pop(rule.name, None)  # it can no longer say whether it still explains others
            text = f"The rule {rule.name!r} failed and has been disabled: {type(error).__name__}: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return []

    def _attribute(self, rule: Rule, alarm: Alarm) -> Alarm:
        """Return the alarm, as a warning that names its cause if there is one. Record a fail without a cause as one."""
        for cause, found in self._standing.values():
            if rule.name in cause.explains and cause is not rule:
                layer = f" in {found.layer}" if found.layer else ""
                evidence = f"{alarm.evidence} Probably a consequence of {cause.name}{layer} at step {found.step}."
                return replace(alarm, severity="warn", evidence=evidence)
        if alarm.severity == "fail":
            self._standing.setdefault(rule.name, (rule, alarm))
        return alarm

    def _forget(self, rule: Rule, before: int) -> None:
        """Drop the layers that the rule has not reported since step `before`."""
        raised = self._raised.get(rule.name, {})
        kept = {layer: state for layer, state in raised.items() if state.reported >= before}
        self._raised[rule.name] = kept
        if not any(state.severity == SEVERITIES.index("fail") for state in kept.values()):
            self._standing.pop(rule.name, None)

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
