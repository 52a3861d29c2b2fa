"""label-order: the labels of a language model do not belong to its input.

Signals, in sampled steps: the share of labels that are the next token of the model's input, or the token at another
distance of up to 4; and the share that occurs among the input's tokens as often as among the labels. Thresholds [ours]:
- Changed: fewer than half of the labels are the next tokens, although at least 99 % were in 3 samples in a row before.
  Either the inputs or the labels are no longer what they were. Persistence: 2 samples.
- Another order: at least 95 % of the labels also occur in the input, but fewer than half of them at any of these
  distances, and attention shows no later tokens, so that the model predicts in order. Persistence: 3 samples over 20
  steps. Models that shift their input themselves have labels at the distance 0.
Both are warnings, because a task may ask for another order. Models with several stacks are not judged for the second.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.monitor.rules.numbers import Streaks, known
from omninorm.record.alarm import Alarm

NEXT, BEFORE, FEW, SAME = 0.99, 3, 0.5, 0.95
CHANGED_SAMPLES, SAMPLES, STEPS = 2, 3, 20


class LabelOrder(Rule):
    """Reports the whole run."""

    name = "label-order"
    source = "exact: labels compared with the input's tokens; the shares of 99, 95 and 50 % are omninorm's own"
    explains = (*LOSS_ALARMS, "no-progress", "held-out-rising", "dead-units")

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._good = 0  # samples in a row whose labels were the next tokens
        self._last: int | None = None  # the newest of them, once there were enough

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        share = sample.next_tokens
        if share is None:
            return
        self._good = self._good + 1 if share >= NEXT else 0
        if self._good >= BEFORE:
            self._last = sample.step
        changed = self._last is not None and share < FEW
        if self._streaks.lasts("changed", changed, sample.step, CHANGED_SAMPLES):
            evidence = (
                f"Labels no longer match the input: up to step {self._last} they were its next tokens, and at step "
            )
            evidence += f"{sample.step} {100 * share:.0f} % of them are."
            remedy = (
                f"Look at the data since step {self._last}: inputs or labels that are shuffled, shifted or corrupted. "
            )
            remedy += "Fix it and resume from a checkpoint before that step."
            yield self.alarm(sample.step, "warn", None, evidence, remedy)
        shuffled = self._last is None and _is_shuffled(history, sample)
        if self._streaks.lasts("shuffled", shuffled, sample.step, SAMPLES, STEPS):
            evidence = (
                f"Labels in another order: {100 * (sample.same_tokens or 0.0):.0f} % of them occur in the input, but "
            )
            evidence += f"{100 * share:.0f} % are its next tokens."
            remedy = "Check that inputs and labels are shuffled, batched and reshaped together. If the task asks for "
            remedy += "another order, ignore this."
            yield self.alarm(sample.step, "warn", None, evidence, remedy)


def _is_shuffled(history: History, sample: Sample) -> bool:
    """Return whether the labels are the input's tokens in another order, in a model that predicts in order."""
    shares = (sample.next_tokens, sample.shifted_tokens, sample.same_tokens)
    if None in shares or len(history.facts.chains) > 1:
        return False
    following, shifted, same = known(shares)
    visible = known(sample.visible_future)
    return max(following, shifted) < FEW and same >= SAME and bool(visible) and max(visible) < 1.0 - NEXT
