"""nonfinite: a NaN or an infinity appeared; where it appeared first tells why.

Signal: the first non-finite value of the run, found by the recorder. Threshold: one value. Persistence: none, since
what a NaN touches becomes NaN. Source: IEEE 754; fp16 ends at 65504.
"""

from __future__ import annotations

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


class NonFiniteRule(Rule):
    """Raised once. After it no other rule has anything to look at."""

    name = "nonfinite"
    source = "IEEE 754: a NaN or an infinity does not go away"
    final = True

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        found = history.nonfinite
        if found is not None and found.step <= step.step:
            yield self._explain(found, history)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        if history.nonfinite is not None:
            yield self._explain(history.nonfinite, history)

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
