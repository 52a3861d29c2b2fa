"""learning-rate: the optimizer's steps are so large that they replace the weights instead of improving them.

Signals: RMS(Δw)/RMS(w) of a step and RMS(w), by group of parameters; and whether the large updates do harm.
Threshold: after the first steps, healthy runs change their weights by 0.1 % to 3 % per step, and 1 % is plenty.
- Above 5 % in nine of ten blocks, for 3 samples over 20 steps, is a warning.
- Above 5 % at a sample after the first while the weights of nine of ten blocks at least double within 50 steps is a
  warning. It is a "fail" if it does harm: the loss is above its initial value, has stopped falling, or the attention
  of a block has collapsed.
[ours] Measured on a Thinker of width 48 with initial weights of std 0.13: at its best learning rate, 3e-3 to 1e-2, the
weights grow by at most 8 % in 20 steps; at 3e-2 by 60 %, and it still learns; at 9e-2 they double within 15 steps and
it stops learning.
The quietest tenth of the blocks counts, so that matrices initialized to 0 (LoRA) do not: relative to their size, their
first updates are infinite. Parts outside the blocks count only where no block is trainable: an embedding initialized
with std 1, PyTorch's default, hardly changes at any learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.alarm import Alarm
from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, finite, known, quantile, values_of
from omninorm.record.signals import Limit

LARGE, AMPLE = 0.05, 0.01
DOUBLED, WITHIN = 2.0, 50
QUIET = 0.1  # share of the blocks that may change less than the one that counts
STALL = 15  # the mean loss of this many steps is compared with that of as many before
COLLAPSED = 0.3  # share of the maximal attention entropy, in runs that began above twice this value
SAMPLES, STEPS = 3, 20


class LearningRate(Rule):
    """Reports the whole run, with an estimate of how many times too high the learning rate is."""

    name = "learning-rate"
    source = "the limits of 1 and 5 % per step are omninorm's own measurement; Karpathy's rule of thumb is 0.1 %"
    explains = (
        "depth-growth",
        "layer-jump",
        "attention-logits",
        "attention-entropy",
        "unrecovered-spike",
        "loss-spike",
        "gradient-spike",
        "no-progress",
        "dead-units",
        "adam-eps",
        "gain-drift",
        "branch-silent",
        "eps-share",
    )

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._first_loss: list[float] = []
        self._first_step: int | None = None
        self._peak: tuple[float, int] | None = (
            None  # the largest ratio after the first step, and the step it occurred at
        )
        self._entropy: float | None = None

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss = finite(step.loss)
        if loss is not None and len(self._first_loss) < 4:
            self._first_loss.append(loss)
        return ()

    def limits(self) -> Sequence[Limit]:
        return (Limit("update_ratio", self.name, LARGE, condition="in nine of ten blocks, after the first steps"),)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        ratios = _of_blocks(history, values_of(sample, "update_ratio"))
        if not ratios:
            return
        ratio = quantile(ratios, QUIET)
        if self._first_step is None:
            self._first_step = sample.step
            self._entropy = _least_entropy(sample)
            if sample.step == 1:  # Adam's first update has the size of the learning rate whatever the gradient
                return
        if self._peak is None or ratio >= self._peak[0] or sample.step - self._peak[1] > WITHIN:
            self._peak = ratio, sample.step
        large = self._streaks.lasts("large", ratio > LARGE, sample.step, SAMPLES, STEPS)
        since, growth = _weight_growth(history, sample)
        doubled = growth >= DOUBLED and self._peak[0] > LARGE
        harm = self._harm(history, sample) if doubled else None
        if large or doubled:
            yield self._explain(sample, self._peak, growth if doubled else None, since, harm)

    def _harm(self, history: History, sample: Sample) -> str | None:
        losses = _newest_losses(history, 2 * STALL)
        if self._first_loss and losses[-5:]:
            first, last = sum(self._first_loss) / len(self._first_loss), sum(losses[-5:]) / len(losses[-5:])
            if last >= first:
                return f"the loss ({last:.3g}) is not below its initial value ({first:.3g})"
        if len(losses) == 2 * STALL:
            before, after = sum(losses[:STALL]) / STALL, sum(losses[STALL:]) / STALL
            if after >= before:
                return f"the loss has stopped falling at {after:.3g}"
        entropy = _least_entropy(sample)
        if entropy is not None and self._entropy is not None and entropy < COLLAPSED < self._entropy / 2:
            return f"attention has collapsed onto single tokens (entropy {entropy:.2g}, initially {self._entropy:.2g})"
        return None

    def _explain(
        self, sample: Sample, peak: tuple[float, int], growth: float | None, since: int, harm: str | None
    ) -> Alarm:
        largest, step = peak
        evidence = f"Learning rate about {largest / AMPLE:.2g} times too high: step {step} changed the weights by "
        evidence += f"{100 * largest:.2g} %, where 1 % is plenty"
        if growth is not None:
            evidence += f"; nearly all weights have grown {growth:.2g}-fold since step {since}"
        evidence += f"; {harm}." if harm else "."
        remedy = f"Divide the learning rate by about {largest / AMPLE:.2g} and use a warm-up."
        return self.alarm(sample.step, "fail" if harm else "warn", None, evidence, remedy)


def _of_blocks(history: History, values: Sequence[float | None]) -> list[float]:
    """Return the known values of the blocks' groups; of all groups where the blocks have none."""
    pairs = zip(history.facts.groups, values, strict=False)
    return known(value for name, value in pairs if name in history.facts.blocks) or known(values)


def _least_entropy(sample: Sample) -> float | None:
    return min(known(values_of(sample, "attention_entropy")), default=None)


def _newest_losses(history: History, count: int) -> list[float]:
    length = len(history.steps)
    newest = (history.steps[at] for at in range(max(length - count, 0), length))
    return known(finite(step.loss) for step in newest)


def _weight_growth(history: History, sample: Sample) -> tuple[int, float]:
    """Return a step at most 50 steps ago, and the growth since then of the blocks' weights, at the quiet quantile."""
    start = sample
    for at in range(len(history.samples) - 1, -1, -1):
        if sample.step - history.samples[at].step > WITHIN:
            break
        start = history.samples[at]
    triples = zip(
        values_of(start, "weight_rms"), values_of(sample, "weight_rms"), values_of(sample, "update_ratio"), strict=False
    )  # frozen groups have no update ratio
    grown = [now / then if then and now is not None and ratio is not None else None for then, now, ratio in triples]
    factors = _of_blocks(history, grown)
    return start.step, quantile(factors, QUIET) if factors else 1.0
