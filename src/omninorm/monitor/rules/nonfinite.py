"""nonfinite: a NaN or an infinity appeared. The place where it appeared first shows the cause.

Signal: the first non-finite value of the run, found by the recorder. Threshold: one value. Persistence: none, because
NaNs propagate. The alarm lasts until loss and gradient norm are finite for 3 consecutive steps: then the bad step was
skipped and the run continues. If they are not finite again for 3 consecutive steps, that is a relapse.
Source: IEEE 754; the largest fp16 number is 65504.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from omninorm.monitor.history import History, NonFinite, Sample, Step
from omninorm.monitor.rules.base import Rule
from omninorm.record.alarm import Alarm

_NAMES = {"nan": "NaN", "inf": "infinity", "-inf": "infinity"}
_WHERE = {
    "forward": "in the output of {layer}",
    "loss": "in the loss, while every module's output was finite",
    "backward": "in the gradient of {layer}, while the loss was finite",
    "optimizer": "in the weights of {layer} after the optimizer's step, while the gradients were finite",
}
_REMEDIES = {
    "loss": "Check the loss for log(0) or a division by 0, labels out of range, or a batch without targets.",
    "backward": "Look for a square root, division or norm at 0 in the graph around {layer}. In fp16, scale the loss.",
    "optimizer": "Check that the learning rate is finite. If it is, raise the optimizer's ε or keep its state in fp32.",
}
RECOVERED = 3
"""Consecutive finite steps after which the run has recovered, and non-finite ones after which it has relapsed."""


class NonFiniteRule(Rule):
    """Reports while steps are not finite: until they are, the other rules cannot judge anything."""

    name = "nonfinite"
    source = "IEEE 754: NaNs and infinities propagate"
    symptom = True
    final = True

    def __init__(self) -> None:
        self._known: set[str] = set()  # which of loss and gradient norm have been finite in this run
        self._finite_steps = self._bad_steps = 0  # consecutive steps
        self._recovered = False
        self._relapse: int | None = None  # the first step of a relapse

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        found = history.nonfinite
        if found is None or found.step > step.step:
            self._is_finite(step)
        elif found.step == step.step:
            self._finite_steps = self._bad_steps = 0
            yield self._explain(found, history)
        else:
            self._count(step)
            yield from self._report(step.step, found, history)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        found = history.nonfinite
        if found is not None and found.step <= sample.step:
            yield from self._report(sample.step, found, history)

    def _is_finite(self, step: Step) -> bool:
        """Return whether every value that has ever been finite is finite now; unknown values are NaN as well."""
        finite = {name for name in ("loss", "grad_norm") if math.isfinite(getattr(step, name))}
        good = bool(finite) and finite >= self._known
        self._known |= finite
        return good

    def _count(self, step: Step) -> None:
        good = self._is_finite(step)
        self._finite_steps, self._bad_steps = (self._finite_steps + 1, 0) if good else (0, self._bad_steps + 1)
        if self._finite_steps >= RECOVERED:
            self._recovered, self._relapse = True, None
        elif self._recovered and self._relapse is None and self._bad_steps >= RECOVERED:
            self._relapse = step.step - self._bad_steps + 1

    def _report(self, step: int, found: NonFinite, history: History) -> Iterable[Alarm]:
        if not self._recovered:
            yield self._explain(found, history)
        elif self._relapse is not None:
            evidence = (
                f"Not finite again: the loss or gradient norm has been NaN or infinite since step {self._relapse}."
            )
            remedy = f"Resume from a checkpoint before step {self._relapse} and skip non-finite steps."
            yield self.alarm(step, "fail", None, evidence, remedy)

    def _explain(self, found: NonFinite, history: History) -> Alarm:
        layer = found.layer or "the model"
        where = _WHERE.get(found.phase, "in {layer}").format(layer=layer)
        name = _NAMES.get(found.value, found.value)
        evidence = f"The first {name} of the run appeared at step {found.step} {where}."
        if found.after:
            evidence += f" The output of {found.after}, the last one checked before it, was finite."
        remedy = self._forward_remedy(found, history) if found.phase == "forward" else _REMEDIES.get(found.phase, "")
        return self.alarm(found.step, "fail", found.layer, evidence, remedy.format(layer=layer))

    @staticmethod
    def _forward_remedy(found: NonFinite, history: History) -> str:
        if found.value != "nan":
            return (
                "If {layer} computes in fp16, whose largest number is 65504, run it in bf16 or fp32. In another dtype, "
                "look for a division by 0, a logarithm of 0, or weights that have grown."
            )
        if history.placement == "none":
            return "The blocks have no norm. Add pre-norms, or scale down the initial output of each block."
        inside = found.layer is not None and any(found.layer.startswith(block) for block in history.facts.blocks)
        if found.after is None and not inside:
            return (
                "Check the weights of {layer}, and its input by torch.isfinite(x).all() before the forward pass: "
                "nothing checked ran before it."
            )
        between = f", and what runs between {found.after} and it," if found.after else ""
        return (
            f"Check {{layer}}{between} for a square root or logarithm of a negative number, 0/0, ∞ − ∞, "
            "or a fully masked attention row."
        )
