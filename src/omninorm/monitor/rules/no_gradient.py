"""no-gradient: modules that run get no gradient, or none arrives at all.

Signals: after each backward pass, the trainable parameters of the optimizer whose `grad` is None, as modules: see
`omninorm.monitor.checks.missing`. There is no threshold. Persistence [ours]:
- no parameter has a gradient in 3 steps: a "fail", or a warning if no optimizer is known;
- gradients are cleared before the optimizer's step: 2 steps, or 2 samples if they are set to 0, a "fail"; a warning if
  this happens to the same blocks only, because some code freezes blocks like this;
- blocks, the attention or feed-forward of a block, or half of a model without blocks: 2 steps, a "fail";
- the last blocks of a stack, one of several stacks, or a module before the blocks: 5 steps, a warning, because their
  output may be unused on purpose;
- a smaller part of one block whose siblings have a gradient: 20 steps, a warning;
- a block that is called, but neither its attention nor its feed-forward: the first 10 steps, or 30 later ones, a
  "fail", because a block that is skipped at random runs sooner;
- a block whose gradients are exactly 0: 10 steps, a warning. The matrices of LoRA, and branches that begin at 0, have
  such gradients in their first step.
Without an optimizer it takes ten times as many steps, because parts of a model may be trained alternately.
Heads, poolers and experts that were not used, and blocks that LayerDrop skips, are not reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.checks.facts import NoGradient
from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import Rule
from omninorm.record.alarm import Alarm

NONE_STEPS, EMPTIED = 3, 2
PERSISTENCE = {"blocks": 2, "part": 2, "most": 2, "stack": 5, "last blocks": 5, "outside": 5, "leaf": 20}
PERSISTENCE |= {"skipped": 10, "zero": 10}
SKIPPED_LATER = 30
FAILS = ("blocks", "part", "most", "skipped")
WITHOUT_OPTIMIZER = 10


class NoGradientRule(Rule):
    """Reports the last module that gets no gradient; None if no parameter gets one."""

    name = "no-gradient"
    source = "exact: the gradient is None after the backward pass; the number of steps is omninorm's own"
    explains = (
        "updates-lost",
        "branch-silent",
        "depth-growth",
        "post-norm-depth",
        "learning-rate",
        "adam-eps",
        "no-progress",
        "unrecovered-spike",
        "layer-jump",
        "dead-units",
        "attention-logits",
    )

    def __init__(self) -> None:
        self._none = self._emptied = self._zeroed = 0
        self._zeroed_in: dict[str, int] = {}
        self._since: dict[NoGradient, int] = {}
        self._first: int | None = None  # the first step with a gradient

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        checks = step.checks
        if checks is None or (checks.optimizer and checks.setup.idle and not checks.stepped):
            return  # other models are trained: see stale-parameters
        self._none = 0 if checks.received else self._none + 1
        if self._none >= NONE_STEPS:
            yield self._explain_none(step.step, checks.optimizer)
        if not checks.received:
            return
        self._emptied = self._emptied + 1 if checks.emptied else 0
        if self._emptied >= EMPTIED:
            yield self._explain_emptied(step.step, f"in each of the last {self._emptied} steps it found none")
        self._since = {found: self._since.get(found, step.step) for found in checks.no_gradient}
        patience = 1 if checks.optimizer else WITHOUT_OPTIMIZER
        self._first = step.step if self._first is None else self._first
        for found, since in self._since.items():
            later = found.kind == "skipped" and since > self._first
            if step.step - since + 1 >= patience * (SKIPPED_LATER if later else PERSISTENCE[found.kind]):
                severity = "fail" if found.kind in FAILS else "warn"
                yield self.alarm(step.step, severity, found.layer, *explain(found, since))

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        before, after = sample.checks.norms or (0.0, 0.0)
        self._zeroed = self._zeroed + 1 if before > 0.0 == after else 0
        if self._zeroed >= EMPTIED:
            yield self._explain_emptied(sample.step, "it is 0 there")
        self._zeroed_in = {name: self._zeroed_in.get(name, 0) + 1 for name in sample.checks.zeroed}
        zeroed = tuple(name for name, count in self._zeroed_in.items() if count >= EMPTIED)
        if zeroed:
            evidence = (
                f"The gradient of {listed(zeroed)} is exactly 0 at optimizer.step(), although the backward pass leaves "
                "one that is not, and other gradients are not 0."
            )
            remedy = (
                "Look for code between loss.backward() and optimizer.step() that writes to these gradients, or "
                "converts them to a dtype in which they underflow."
            )
            remedy += " Parts that are frozen like this on purpose are better frozen by requires_grad=False."
            yield self.alarm(sample.step, "warn", zeroed[-1], evidence, remedy)

    def _explain_emptied(self, step: int, how: str) -> Alarm:
        evidence = f"No gradient reaches the optimizer: the backward pass leaves one, but at optimizer.step() {how}."
        remedy = "Call zero_grad() after optimizer.step(), not between the backward pass and the step."
        return self.alarm(step, "fail", None, evidence, remedy)

    def _explain_none(self, step: int, optimizer: bool) -> Alarm:
        evidence = f"No gradient arrived in the last {self._none} steps: no parameter had one when the step ended."
        remedy = "Call loss.backward() before optimizer.step(), on a loss that this model computed outside "
        remedy += "torch.no_grad() and without detach()."
        return self.alarm(step, "fail" if optimizer else "warn", None, evidence, remedy)


def explain(found: NoGradient, since: int) -> tuple[str, str]:
    """Return the evidence and the remedy for modules without a gradient."""
    names, count = listed(found.parts), found.parameters
    parameters = "1 parameter" if count == 1 else f"{count} parameters"
    if found.kind == "zero":
        evidence = f"The gradient of {names} has been exactly 0 since step {since} ({parameters}), others are not 0."
        return evidence, f"Look for a factor of 0, or an input that does not change, on the path through {found.layer}."
    if found.kind == "skipped":
        evidence = f"Block skipped: since step {since} {names} returns without calling its attention or its "
        evidence += f"feed-forward, so none of its parameters gets a gradient ({parameters})."
        remedy = f"Look for an early return or a condition in the forward of {names}. If it is skipped on purpose, "
        return evidence, remedy + "set requires_grad=False."
    evidence = f"No gradient reaches {names} since step {since} ({parameters}), "
    if found.kind == "leaf":
        evidence += "while the same part of the other blocks gets one."
    else:
        evidence += f"although the forward pass runs them and {found.follows or 'the rest'} gets one."
    if found.kind == "last blocks":
        remedy = f"If the loss should use the output of {found.layer}, look for detach() or torch.no_grad() behind it. "
        return evidence, remedy + "Otherwise these blocks cost time without being trained."
    remedy = f"Look for detach(), torch.no_grad(), .data or a conversion to NumPy at the end of {found.layer} or right "
    remedy += "after it, and for checkpointing with use_reentrant=True whose inputs need no gradient."
    if found.kind in ("stack", "outside"):
        remedy += f" If {found.layer} should not be trained, set requires_grad=False."
    return evidence, remedy


def listed(names: Sequence[str]) -> str:
    """Return up to three names, or the first and the last with the number of all."""
    if len(names) > 3:
        return f"{names[0]} to {names[-1]} ({len(names)} modules)"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
