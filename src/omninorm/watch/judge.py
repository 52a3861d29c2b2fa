"""Judge: asks the rules, and says everything once, causes first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from omninorm.errors import ConfigError
from omninorm.watch.alarm import SEVERITIES, Alarm
from omninorm.watch.history import History, Step
from omninorm.watch.rules import Rule, default_rules

CLEAR_STEPS, CLEAR_SAMPLES = 128, 10
"""An alarm may be raised anew once its rule has had nothing to say about the layer for so many steps and samples."""
NAMED = 3
"""How many of the other layers an alarm about many of them names."""


@dataclass
class _Raised:
    """What was last said about a layer, and when its rule last had something to say about it."""

    severity: int
    reported: int


class Judge:
    """Holds the rules of one run. Rules report as long as something is wrong; the judge raises an alarm

    - the first time that a rule reports a layer, and again when it gets more severe or had been clear for a while;
    - once for all layers, about the worst, where a rule reports more than its `most_layers`, three;
    - as a warning that names the cause, where another rule has a "fail" standing that explains it;
    - in the order: fails before warnings, and as the rules are listed, which for ours is causes before consequences.

    While a rule that is `final` reports (a NaN or an infinity) nothing more is raised: the rest comes of it.

    Args:
        rules: the rules, with fresh state; None means `default_rules()`.

    Raises:
        ConfigError: something among the rules is no Rule, or two have one name.
    """

    def __init__(self, rules: Iterable[Rule] | None = None) -> None:
        if rules is not None and not isinstance(rules, Iterable):
            raise ConfigError(
                "rules must be a list of rules", type(rules).__name__, "pass e.g. [*default_rules(), Mine()]"
            )
        self.rules = default_rules() if rules is None else list(rules)
        self._check()
        self._order = {rule.name: place for place, rule in enumerate(self.rules)}
        self._raised: dict[str, dict[str | None, _Raised]] = {}
        self._standing: dict[str, tuple[Rule, Alarm]] = {}  # fails without a cause among the other fails

    def judge_steps(self, history: History, new_steps: Sequence[Step]) -> list[Alarm]:
        """Alarms about steps that are new in the history, oldest first."""
        return [alarm for step in new_steps for alarm in self._judge_step(history, step)]

    def judge_sample(self, history: History) -> list[Alarm]:
        """Alarms about the history's newest sample. Judge the steps up to it first."""
        if not history.samples:
            return []
        sample = history.samples[-1]
        return self._raise(history, sample.step, lambda rule: rule.on_sample(history, sample))

    def _judge_step(self, history: History, step: Step) -> list[Alarm]:
        return self._raise(history, step.step, lambda rule: rule.on_step(history, step))

    def _check(self) -> None:
        for rule in self.rules:
            if not isinstance(rule, Rule):
                remedy = "derive it from omninorm.watch.rules.Rule"
                raise ConfigError("rules must be instances of Rule", repr(rule)[:80], remedy)
        names = [rule.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError("every rule must have a name of its own", f"{', '.join(twice)} twice", "rename one")

    def _raise(self, history: History, step: int, ask: Callable[[Rule], Iterable[Alarm]]) -> list[Alarm]:
        clear = max(CLEAR_STEPS, CLEAR_SAMPLES * history.facts.every)
        alarms: list[Alarm] = []
        for rule in list(self.rules):
            reports = self._ask(rule, ask)
            if reports and rule.final:
                self._forget(rule, step - clear)
                return [*alarms, *self._told(rule, step, reports[:1])]
            if reports or rule.name in self._raised:
                self._forget(rule, step - clear)
                alarms += self._told(rule, step, [self._attribute(rule, alarm) for alarm in reports])
        return sorted(alarms, key=lambda alarm: (-SEVERITIES.index(alarm.severity), self._order[alarm.rule]))

    def _ask(self, rule: Rule, ask: Callable[[Rule], Iterable[Alarm]]) -> list[Alarm]:
        """What a rule reports. One that raises an error is dropped with a warning: watching must not end a training."""
        try:
            return [_checked(alarm) for alarm in ask(rule)]
        except Exception as error:
            self.rules = [other for other in self.rules if other is not rule]
            text = f"the rule {rule.name!r} failed and is not asked any more: {type(error).__name__}: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return []

    def _attribute(self, rule: Rule, alarm: Alarm) -> Alarm:
        """The alarm as it is, or as a warning that names its cause; a fail without a cause may be one to others."""
        for cause, found in self._standing.values():
            if rule.name in cause.explains and cause is not rule:
                layer = f" at {found.layer}" if found.layer else ""
                evidence = f"{alarm.evidence} Probably a consequence of {cause.name}{layer}, step {found.step}."
                return replace(alarm, severity="warn", evidence=evidence)
        if alarm.severity == "fail":
            self._standing.setdefault(rule.name, (rule, alarm))
        return alarm

    def _forget(self, rule: Rule, before: int) -> None:
        """Drops what the rule has not reported since step `before`."""
        raised = self._raised.get(rule.name, {})
        kept = {layer: state for layer, state in raised.items() if state.reported >= before}
        self._raised[rule.name] = kept
        if not any(state.severity == SEVERITIES.index("fail") for state in kept.values()):
            self._standing.pop(rule.name, None)

    def _told(self, rule: Rule, step: int, reports: list[Alarm]) -> list[Alarm]:
        """Of a rule's reports those to be raised now, as one if they are many. Remembers all."""
        raised = self._raised.setdefault(rule.name, {})
        new = [alarm for alarm in reports if self._is_news(raised.get(alarm.layer), alarm)]
        top = max((SEVERITIES.index(alarm.severity) for alarm in new), default=0)
        known = sum(state.severity >= top for state in raised.values())
        for alarm in reports:
            state = raised.setdefault(alarm.layer, _Raised(0, step))
            state.severity = max(state.severity, SEVERITIES.index(alarm.severity))
            state.reported = step
        if known > rule.most_layers:  # it has been said that many layers do this; that some more do is no news
            return []
        return [_merge(new[0], new)] if new and len(reports) > rule.most_layers else new

    @staticmethod
    def _is_news(state: _Raised | None, alarm: Alarm) -> bool:
        return state is None or SEVERITIES.index(alarm.severity) > state.severity


def _checked(alarm: Alarm) -> Alarm:
    if alarm.severity not in SEVERITIES:
        raise ValueError(f"an alarm's severity must be 'warn' or 'fail', but got {alarm.severity!r}")
    return alarm


def _merge(worst: Alarm, new: Sequence[Alarm]) -> Alarm:
    """The worst layer's alarm, with the number of the others that are news and some of their names."""
    others = list(dict.fromkeys(str(alarm.layer) for alarm in new if alarm.layer != worst.layer))
    if not others:
        return worst
    names = ", ".join(others[:NAMED]) + (", …" if len(others) > NAMED else "")
    return replace(worst, evidence=f"{worst.evidence} So it is with {len(others)} more: {names}.")
