"""stale-parameters: the model's parameters, or its optimizer, are not those that are watched and trained.

Signals: the identity of the model's parameters and of the tensors in the optimizers, compared with the beginning;
whether the model is called; and whether weights change although none of the optimizers makes a step. There is no
threshold. Tensors that an optimizer holds instead of the model's own, new parameters in no optimizer, and an optimizer
whose model is not called are a "fail": the training does not reach the parameters in use. Others are a warning that
names what is no longer measured. Persistence [ours]: 5 steps if weights change without the optimizers' steps, 3 if the
model is not called and no gradient arrives, 2 for replaced parameters if no gradient arrives; otherwise none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.checks.facts import Stale
from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.record.alarm import Alarm

MOVED, IDLE, REPLACED = 5, 3, 2


class StaleParameters(Rule):
    """Reports the smallest module that contains the parameters."""

    name = "stale-parameters"
    source = "exact: the identity of parameters"
    explains = (
        *LOSS_ALARMS,
        "optimizer-coverage",
        "no-gradient",
        "steps-skipped",
        "no-progress",
        "layer-jump",
        "odd-block",
    )

    def __init__(self) -> None:
        self._moved = self._idle = self._replaced = 0

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        checks = step.checks
        if checks is None:
            return
        if checks.stepped or checks.received:
            self._moved = self._moved + 1 if checks.moved and not checks.stepped else 0
        self._replaced = self._replaced + 1 if checks.stale is not None else 0
        if checks.stale is not None and self._replaced >= REPLACED:
            yield self._explain(step.step, checks.stale)
        self._idle = self._idle + 1 if checks.setup.idle and not checks.received else 0
        if self._idle >= IDLE and checks.optimizer:
            yield self._explain_idle(step.step, checks.stepped)
        if self._moved >= MOVED:
            evidence = (
                f"The weights changed in the last {self._moved} steps, but none of the optimizers passed to watch "
            )
            evidence += "made a step: updates and learning rates are no longer measured."
            remedy = "If the optimizer was replaced, close this Watch and open another with the new optimizer."
            yield self.alarm(step.step, "warn", None, evidence, remedy)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        if sample.checks.stale is not None:
            yield self._explain(sample.step, sample.checks.stale)

    def _explain_idle(self, step: int, stepped: bool) -> Alarm:
        evidence = f"The model passed to watch was not called in the last {self._idle} steps, "
        if stepped:
            evidence += (
                "but the optimizer that holds its parameters made steps: the loss comes from another model, such "
            )
            evidence += "as a copy, which this optimizer does not train."
            remedy = "Create the optimizer after the model was loaded, copied or wrapped, and pass the model that the "
            return self.alarm(step, "fail", None, evidence, f"{remedy}loop calls to watch.")
        evidence += "and its optimizer made no step: the run is no longer measured."
        remedy = "If another model is trained now, close this Watch and open one for that model and its optimizer."
        return self.alarm(step, "warn", None, evidence, remedy)

    def _explain(self, step: int, stale: Stale) -> Alarm:
        if stale.foreign and not (stale.replaced or stale.added):
            evidence = f"The optimizer holds {stale.foreign} tensors that are not parameters of the model, while the "
            evidence += "model's own of the same shapes are in no optimizer and are not trained."
            remedy = "Create the optimizer after the last change to the model: new modules, quantization, adapters."
            return self.alarm(step, "fail", common(stale.unheld) or None, evidence, remedy)
        if stale.unheld:
            layer = common(stale.unheld)
            evidence = (
                f"{len(stale.unheld)} parameters of {layer or 'the model'} were replaced or added after the watch "
            )
            evidence += "was opened. The optimizer does not hold the new ones, so they are not trained."
            remedy = "Add them to the optimizer, or create it again, then open another Watch."
            return self.alarm(step, "fail", layer or None, evidence, remedy)
        return self._explain_unmeasured(step, stale)

    def _explain_unmeasured(self, step: int, stale: Stale) -> Alarm:
        names = [*stale.replaced, *stale.added, *stale.removed]
        counts = [(len(stale.replaced), "replaced"), (len(stale.added), "added"), (len(stale.removed), "removed")]
        what = ", ".join(f"{count} {verb}" for count, verb in counts if count)
        layer = common(names)
        evidence = f"Parameters of {layer or 'the model'} changed after the watch was opened: {what}. The new ones are "
        evidence += "not measured."
        remedy = "If this is intended, close this Watch and open another, with step= to continue the record."
        return self.alarm(step, "warn", layer or None, evidence, remedy)


def common(names: Sequence[str]) -> str:
    """Return the smallest module that contains all parameters of these names; "" for the model."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
