"""evaluation-mode: dropout and BatchNorm are off in training, or on in an evaluation.

Signals: `training` of the model and of its modules with dropout or running statistics, at the beginning of each
forward pass. Persistence [ours]:
- 3 steps that trained in evaluation mode throughout. Modules that disagree are set on purpose, and so are those whose
  parameters are all frozen;
- 2 passes without gradients in training mode, in less than half of the steps: methods that need such passes, such as
  pseudo-labels, make them in every step.
Both are warnings: the run trains, but with another regularization than intended.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.checks.facts import Setup
from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.record.alarm import Alarm

STEPS, PASSES = 3, 2


class EvaluationMode(Rule):
    """Reports the whole run."""

    name = "evaluation-mode"
    source = "exact: the modules' own flags; the number of steps is omninorm's own"

    def __init__(self) -> None:
        self._off = self._steps = self._with = self._passes = 0
        self._on = ""

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        if step.checks is None:
            return
        setup = step.checks.setup
        if setup.trained and step.checks.received:
            self._off = self._off + 1 if setup.off else 0
        self._count(setup)
        if self._off >= STEPS:
            evidence = (
                f"The model is in evaluation mode: {setup.off or 'dropout'} {'are' if 'and' in setup.off else 'is'} "
            )
            evidence += f"off. It has trained like this since step {step.step - self._off + 1}."
            remedy = "Call model.train() before training and after each evaluation; from_pretrained returns models in "
            remedy += "evaluation mode. To train without dropout, set its probability to 0."
            yield self.alarm(step.step, "warn", None, evidence, remedy)
        if self._passes >= PASSES and 2 * self._with < self._steps:
            evidence = f"The model is in training mode while it is evaluated: {self._on} "
            evidence += f"{'are' if 'and' in self._on else 'is'} active in {self._passes} passes without gradients."
            remedy = "Call model.eval() before the evaluation and model.train() after it."
            yield self.alarm(step.step, "warn", None, evidence, remedy)

    def _count(self, setup: Setup) -> None:
        self._steps += 1
        if setup.proper:
            self._passes = 0
        if setup.evaluated:
            self._with += 1
            self._passes += setup.evaluated
            self._on = setup.on
