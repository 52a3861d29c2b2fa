"""nonfinite: a NaN or an infinity appeared; where it appeared first tells why.

Signal: the first non-finite value of the run, found by the recorder. Threshold: one value. Persistence: none, since
what a NaN touches becomes NaN. It goes on until 3 steps running have a finite loss and gradient norm again: then the
step was skipped, and the run is alive. Not finite again for 3 steps running is a relapse.
Source: IEEE 754; fp16 ends at 65504.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from omninorm.watch.alarm import Alarm
from omninorm.watch.history import History, NonFinite, Sample, Step
from omninorm.watch.rules.base import Rule

_NAMES = {"nan": "NaN", "inf": "infinity", "-inf": "infinity"}
_WHERE = {
    "forward": "in the output of {layer}",
    "loss": "in the loss, while every module's output was finite",
    "backward": "in the gradient of {layer}, while the loss was finite",
    "optimizer": "in the weights of {layer} after the optimizer's step, while the gradients were finite",
}
_REMEDIES = {
    "loss": "Look at the loss: a logarithm or quotient of 0, labels out of range, or a batch with nothing to predict.",
    "backward": "Look for a root, quotient or norm of 0 in {layer}'s part of the graph; in fp16 scale the loss.",
    "optimizer": "Raise the optimizer's ε, keep its state in fp32, or lower the learning rate.",
}
RECOVERED = 3
"""Steps running that must be finite for the run to be alive again, or not finite for it to be lost again."""


class NonFiniteRule(Rule):
    """Reports while steps are not finite: until then no other rule has anything to look at."""

    name = "nonfinite"
    source = "IEEE 754: a NaN or an infinity does not go away"
    final = True

    def __init__(self) -> None:
        self._known: set[str] = set()  # of loss and gradient norm those that have been finite in this run
        self._well = self._ill = 0  # steps running
        self._recovered = False
        self._relapse: int | None = None  # its first step

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        found = history.nonfinite
        if found is None or found.step > step.step:
            self._is_well(step)
        elif found.step == step.step:
            self._well = self._ill = 0
            yield self._explain(found, history)
        else:
            self._count(step)
            yield from self._report(step.step, found, history)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        found = history.nonfinite
        if found is not None and found.step <= sample.step:
            yield from self._report(sample.step, found, history)

    def _is_well(self, step: Step) -> bool:
        """Whether something is finite, and all is that has ever been; what is not known is NaN, too."""
        finite = {name for name in ("loss", "grad_norm") if math.isfinite(getattr(step, name))}
        well = bool(finite) and finite >= self._known
        self._known |= finite
        return well

    def _count(self, step: Step) -> None:
        self._well, self._ill = (self._well + 1, 0) if self._is_well(step) else (0, self._ill + 1)
        if self._well >= RECOVERED:
            self._recovered, self._relapse = True, None
        elif self._recovered and self._relapse is None and self._ill >= RECOVERED:
            self._relapse = step.step - self._ill + 1

    def _report(self, step: int, found: NonFinite, history: History) -> Iterable[Alarm]:
        if not self._recovered:
            yield self._explain(found, history)
        elif self._relapse is not None:
            evidence = f"Not finite again: loss or gradient norm have been NaN or infinite since step {self._relapse}."
            remedy = f"Go back to a checkpoint before step {self._relapse}, and skip steps that are not finite."
            yield self.alarm(step, "fail", None, evidence, remedy)

    def _explain(self, found: NonFinite, history: History) -> Alarm:
        layer = found.layer or "the model"
        where = _WHERE.get(found.phase, "in {layer}").format(layer=layer)
        name = _NAMES.get(found.value, found.value)
        evidence = f"The first {name} of the run appeared at step {found.step} {where}."
        remedy = self._forward_remedy(found, history) if found.phase == "forward" else _REMEDIES.get(found.phase, "")
        return self.alarm(found.step, "fail", found.layer, evidence, remedy.format(layer=layer))

    @staticmethod
    def _forward_remedy(found: NonFinite, history: History) -> str:
        if found.value != "nan":
            return (
                "{layer} left the range of its dtype (fp16 ends at 65504): run it in bf16 or fp32, "
                "or make its weights smaller."
            )
        if history.placement == "none":
            return "The blocks have no norm: add pre-norms, or scale the blocks' initial output down."
        inside = found.layer is not None and any(found.layer.startswith(block) for block in history.facts.blocks)
        if inside:
            return "Look at {layer}: a root or logarithm of a negative number, 0/0, ∞ − ∞, or a row masked entirely."
        return f"Look at the batch of step {found.step}: no block had run before {{layer}} put out a NaN."
