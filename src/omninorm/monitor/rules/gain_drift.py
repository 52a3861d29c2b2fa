"""gain-drift: a norm's gains have drifted apart, or become 0.

Signals: max |γ|, max |γ|/median |γ|, and the share of |γ| < 1e-3. Threshold: a ratio above 10 that is also 3 times its
first value is a warning [ours]; pretrained models may begin with a larger one. If all gains are 0, the norm outputs
nothing: a "fail", immediately if they are frozen, otherwise after 3 samples over 20 steps, because gains initialized
to 0 on purpose change within a step. More than half of the gains near 0 is a warning if fewer were at first: some norms
store γ − 1, or begin at 0 on purpose. Persistence of the warnings: 3 samples over 20 steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.monitor.rules.numbers import Streaks, factor, values_of
from omninorm.record.alarm import Alarm
from omninorm.record.signals import Limit

RATIO, DRIFT = 10.0, 3.0
SILENT = 0.5
SAMPLES, STEPS = 3, 20


class GainDrift(Rule):
    """Reports the norm."""

    name = "gain-drift"
    source = "the threshold, 10-fold, is omninorm's own; see docs/watching.md"
    explains = (*LOSS_ALARMS, "branch-silent", "dead-units", "adam-eps", "depth-growth", "no-progress")

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._first: dict[int, float] = {}
        self._first_silent: dict[int, float] = {}

    def limits(self) -> Sequence[Limit]:
        condition = f"and {DRIFT:g} times the first value"
        return (Limit("gain_ratio", self.name, RATIO, condition=condition), Limit("gain_small", self.name, SILENT))

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        zero: list[Alarm] = []
        drifted: list[tuple[float, Alarm]] = []
        largest, ratios, shares = (values_of(sample, name) for name in ("gain_max", "gain_ratio", "gain_small"))
        for index, norm in enumerate(history.facts.norms):
            if self._is_zero(_at(largest, index), norm.frozen, index, sample.step):
                zero.append(self._explain_zero(norm.name, norm.frozen, sample.step))
                continue
            ratio, silent = _at(ratios, index), _at(shares, index)
            first = self._first.setdefault(index, ratio) if ratio is not None else None
            grown = ratio is not None and first is not None and ratio > max(RATIO, DRIFT * first)
            if self._lasts(("ratio", index), grown, sample.step) and ratio and first:
                drifted.append((ratio, self._explain_ratio(norm.name, ratio, first, sample.step)))
            at_first = None if silent is None else self._first_silent.setdefault(index, silent)
            silenced = silent is not None and at_first is not None and silent > SILENT >= at_first
            if self._lasts(("silent", index), silenced, sample.step) and silent:
                decay = _at(list(sample.gain_decay), index)
                drifted.append((silent, self._explain_silent(norm.name, silent, decay, sample.step)))
        yield from zero
        yield from (alarm for _, alarm in sorted(drifted, key=lambda found: found[0], reverse=True))

    def _lasts(self, key: tuple[str, int], holds: bool, step: int) -> bool:
        return self._streaks.lasts(key, holds, step, SAMPLES, STEPS)

    def _is_zero(self, largest: float | None, frozen: bool, index: int, step: int) -> bool:
        lasting = self._lasts(("zero", index), largest == 0.0, step)
        return largest == 0.0 and (frozen or lasting)

    def _explain_zero(self, norm: str, frozen: bool, step: int) -> Alarm:
        evidence = (
            f"All gains of {norm} are 0"
            + (" and frozen" if frozen else "")
            + ": the layers that read its output get no input."
        )
        remedy = f"Set the gains of {norm} to 1" + (" and make them trainable (requires_grad=True)." if frozen else ".")
        return self.alarm(step, "fail", norm, evidence, remedy)

    def _explain_ratio(self, norm: str, ratio: float, first: float, step: int) -> Alarm:
        evidence = (
            f"The largest gain of {norm} has grown from {factor(first)} to {factor(ratio)} times the median gain."
        )
        remedy = "Use a lower learning rate for gains, and expect outlier channels after this norm when quantizing."
        return self.alarm(step, "warn", norm, evidence, remedy)

    def _explain_silent(self, norm: str, silent: float, decay: float | None, step: int) -> Alarm:
        evidence = f"{100 * silent:.0f} % of the gains of {norm} have fallen below 1e-3."
        remedy = "Look for code that writes to these gains, and do not apply weight decay to gains."
        if decay is not None:
            remedy = "Do not apply weight decay to gains." if decay else "Look for code that writes to these gains."
        return self.alarm(step, "warn", norm, evidence, remedy)


def _at(values: list[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None
