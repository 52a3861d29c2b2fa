"""learning-rate: the optimizer's steps are so large that they replace the weights instead of improving them.

Signals: RMS(Δw)/RMS(w) of a step and RMS(w), by group of parameters; the learning rate; and whether the updates do
harm: the loss is not below its initial value, has stopped falling (mean of 15 steps against the 15 before), the
attention of a block has collapsed, or the residual stream has exploded (1,000 times its first RMS, and above 1,000).
Threshold, each only together with harm, and a "fail" unless the only harm is that the loss has stopped falling for 30
steps, which noise or a plateau can do as well:
- In the first 50 steps, or for as long as the learning rate rises, the updates of nine of ten blocks are 1.5 times the
  largest that train, relative to the *initial* weights: 30 % per step at width 64 or less, and 1/√width of that for
  wider models, because one update is nearly of rank one: relative to random weights, its effect on the output grows
  with √width. 30 % at any width with Muon, whose updates have full rank; 5 % in post-norm models; 1.2 % with SGD.
- After these 50 steps, an update above 5 % while the weights of nine of ten blocks at least double within 50 steps.
Without harm, updates of twice the first limits for 3 samples over 20 steps are a warning. The alarm says "at least
N-fold", where N is the ratio to the first limit. Relative to the initial weights, the first updates are proportional to
the learning rate; later ones are not, because the weights have grown. Updates of Adam, Lion and Muon do not depend on
the size of the gradient, so those at the full learning rate follow from a sample in warm-up; of SGD only the first step
counts, because the gradients of a diverging run explode. [ours] Largest learning rates whose loss after 60 steps is
within 0.3 nats of the best one, without warm-up, 4 blocks: the first update is 20 % of the weights for a nanoGPT of
width 64 with AdamW, 40 % for GPT-2, 43 % for Llama, 27 % for a Thinker, 120 % with PyTorch's initialization, 3 % in a
post-norm Thinker; 20 and 54 % with Lion, 100 % or more with Muon; with SGD 0.4 to 2.7 %; and 10 % for a nanoGPT of
width 128, 256 or 512. Of 65 runs at 3 to 500 times these rates, the factor was within a factor of 3 in 61, and 1 was
missed. OLMo-2 trains at any of them, which is why harm is required. The quietest tenth of the blocks counts, so that
matrices initialized to 0 (LoRA) do not: relative to their size, their first updates are infinite. Parts outside the
blocks count only where no block is trainable (a new head on a frozen model), and then only a loss that is 20 % above
its initial value is harm: the weights of a head begin small, and so does its loss's fall.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.monitor.rules.numbers import Streaks, finite, fold, known, quantile, values_of
from omninorm.monitor.rules.stream_growth import StreamStart
from omninorm.record.alarm import Alarm
from omninorm.record.signals import Limit

LIMIT, POST_LIMIT, SGD_LIMIT = 0.3, 0.05, 0.012  # of the initial weights, per step
WIDTH = 64.0  # up to which the first limit holds
EARLY, FIRST = 50, 1
JUMP, WARM_UP = 5.0, 10  # a rise above the largest learning rate so far that no schedule has after the first steps
TOO_HIGH, WARN = 1.5, 2.0  # times the limit
FROM_ZERO = 100.0  # a larger ratio at the first step means that the weights were initialized to 0
LARGE = 0.05
DOUBLED, WITHIN = 2.0, 50
QUIET = 0.1  # share of the blocks that may change less than the one that counts
ENOUGH = 8  # losses, of which the first four are compared with the newest five
STALL = 15  # the mean loss of this many steps is compared with that of as many before
HEAD_RISE = 1.2  # of the loss, where only a head is trained
EXPLODED = 1e3  # of the residual stream, relative to its first sample
COLLAPSED = 0.3  # share of the maximal attention entropy, in runs that began above twice this value
SAMPLES, STEPS = 3, 20


class Harm(NamedTuple):
    """The harm that too large updates did, in words. A plateau of the loss is not severe: it may fall again."""

    words: str
    severe: bool = True


class LearningRate(Rule):
    """Reports the whole run, with an estimate of how many times too high the learning rate is at least."""

    name = "learning-rate"
    source = "the limits of 30, 5 and 1.2 % of the initial weights per step are omninorm's own measurement"
    explains = (
        *LOSS_ALARMS,
        "depth-growth",
        "layer-jump",
        "attention-logits",
        "attention-entropy",
        "no-progress",
        "dead-units",
        "adam-eps",
        "gain-drift",
        "branch-silent",
        "eps-share",
        "odd-block",
        "weights-vanish",
        "gradient-clipped",
        "logz",
        "nonfinite",
        "stream-growth",
    )

    def __init__(self) -> None:
        self._streaks, self._stream = Streaks(), StreamStart()
        self._first_loss: list[float] = []
        self._initial: dict[int, float] = {}  # RMS of each group's initial weights
        self._entropy: float | None = None
        self._early = (0.0, 0)  # the largest early update relative to the initial weights, and its step
        self._per_rate = 0.0  # the same, divided by the learning rate
        self._rate, self._rising = 0.0, 0  # the largest learning rate, and the last step at which it rose
        self._jump: tuple[int, float, float] | None = None  # the step of a jump, and the learning rates
        self._peak: tuple[float, int] | None = None  # the largest ratio after the first step, and its step

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss, rate = finite(step.loss), finite(step.lr)
        if loss is not None and len(self._first_loss) < 4:
            self._first_loss.append(loss)
        if rate is not None and rate > self._rate:
            if step.step > WARM_UP and 0.0 < JUMP * self._rate < rate:
                self._jump = step.step, self._rate, rate
            self._rate, self._rising = rate, step.step
        return ()

    def limits(self) -> Sequence[Limit]:
        return (
            Limit(
                "update_ratio", self.name, LARGE, condition="in nine of ten blocks, if weights double and it does harm"
            ),
        )

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        exploded = self._stream.exploded(sample, EXPLODED)
        ratios = _of_blocks(history, values_of(sample, "update_ratio"))
        if not ratios:
            return
        self._look_early(history, sample)
        ratio = quantile(ratios, QUIET)
        if sample.step > 1 and (self._peak is None or ratio >= self._peak[0] or sample.step - self._peak[1] > WITHIN):
            self._peak = ratio, sample.step
        limit, times = self._limit(history), self._times(history)
        large = self._streaks.lasts("large", ratio > WARN * max(limit, LARGE), sample.step, SAMPLES, STEPS)
        since, growth = _weight_growth(history, sample)
        late = since >= EARLY or not self._initial
        doubled = late and growth >= DOUBLED and self._peak is not None and self._peak[0] > LARGE
        harm = self._harm(history, sample, exploded) if doubled or times >= TOO_HIGH else None
        if harm or large:
            grown = f"; nearly all weights have grown {growth:.2g}-fold since step {since}" if doubled else ""
            yield self._explain(history, sample, max(times, ratio / limit if large else 0.0), grown, harm)

    def _look_early(self, history: History, sample: Sample) -> None:
        """Measure this sample's update relative to the initial weights, if it is early enough."""
        ratios, weights = values_of(sample, "update_ratio"), values_of(sample, "weight_rms")
        before = [
            None if w is None or r is None else w / (1 + r * r) ** 0.5 for w, r in zip(weights, ratios, strict=False)
        ]
        if not self._initial:
            if sample.step != 1:  # a resumed run: its initial weights are unknown
                return
            self._initial = {at: w for at, w in enumerate(before) if w and (ratios[at] or 0.0) < FROM_ZERO}
            self._entropy = _least_entropy(sample)
        if sample.step > max(EARLY, self._rising + history.facts.every):
            return
        if _is_sgd(history) and sample.step > FIRST and self._per_rate:
            return  # once the run diverges, its gradients explode
        relative = [
            r * w / self._initial[at] if r is not None and w is not None and at in self._initial else None
            for at, (r, w) in enumerate(zip(ratios, before, strict=False))
        ]
        found = _of_blocks(history, relative)
        if found:
            update = quantile(found, QUIET)
            self._early = max(self._early, (update, sample.step))
            rate = next((finite(step.lr) for step in reversed(history.steps) if step.step == sample.step), None)
            self._per_rate = max(self._per_rate, update / rate) if rate else self._per_rate

    @staticmethod
    def _limit(history: History) -> float:
        if _is_sgd(history):
            return SGD_LIMIT
        if history.placement == "post":
            return POST_LIMIT
        width = history.facts.width or WIDTH
        return LIMIT if _is_muon(history) else LIMIT * min(1.0, (WIDTH / width) ** 0.5)

    def _times(self, history: History) -> float:
        """Return how many times too large the early updates were, or those at the largest learning rate so far."""
        return max(self._early[0], self._per_rate * self._rate) / self._limit(history)

    def _harm(self, history: History, sample: Sample, exploded: dict[int, float]) -> Harm | None:
        losses = _newest_losses(history, 2 * STALL)
        if len(losses) >= ENOUGH:
            first, last = sum(self._first_loss) / len(self._first_loss), sum(losses[-5:]) / len(losses[-5:])
            if last >= first * (1.0 if _has_trainable_blocks(history, sample) else HEAD_RISE):
                return Harm(f"the loss ({last:.3g}) is not below its initial value ({first:.3g})")
        if not _has_trainable_blocks(history, sample):
            return None
        if exploded:
            return Harm(f"the residual stream has grown {fold(max(exploded.values()))}")
        entropy = _least_entropy(sample)
        if entropy is not None and self._entropy is not None and entropy < COLLAPSED < self._entropy / 2:
            words = f"(entropy {entropy:.2g}, initially {self._entropy:.2g})"
            return Harm(f"attention has collapsed onto single tokens {words}")
        if len(losses) == 2 * STALL:
            before, after = sum(losses[:STALL]) / STALL, sum(losses[STALL:]) / STALL
            if after >= before:
                return Harm(f"the loss has stopped falling at {after:.3g}", severe=False)
        return None

    def _explain(self, history: History, sample: Sample, times: float, grown: str, harm: Harm | None) -> Alarm:
        limit = self._limit(history)
        if times >= TOO_HIGH:
            size = "current" if harm is None else "initial"
            evidence = (
                f"Learning rate at least {fold(float(f'{times:.2g}'))} too high: a step changes the weights by up to "
                f"{_rounded(100 * times * limit)} % of their {size} size, where {_rounded(100 * limit)} % is the most "
                "that trains"
            )
            remedy = f"Divide the learning rate by {_rounded(times)} to {_rounded(3 * times)} and use a warm-up."
        else:
            peak, step = self._peak or (0.0, sample.step)
            evidence = (
                f"Learning rate too high: step {step} changed the weights by {_rounded(100 * peak)} %, where 1 % is "
                "plenty"
            )
            remedy = f"Divide the learning rate by about {_rounded(max(peak / 0.01, 2.0))} and use a warm-up."
        if history.passes > 1:
            remedy += f" If the loss is not divided by the {history.passes} accumulation steps, divide it first."
        evidence += f"{grown}; {harm.words}." if harm else f"{grown}."
        if self._jump:
            at, before, after = self._jump
            evidence += f" It jumped from {before:.3g} to {after:.3g} at step {at}."
            remedy = f"Undo the jump of the schedule at step {at}. If it is intended, d{remedy[1:]}"
        return self.alarm(sample.step, "fail" if harm and harm.severe else "warn", None, evidence, remedy)


def _rounded(value: float) -> str:
    """Return a number of two digits without an exponent, such as "510"."""
    return f"{float(f'{value:.2g}'):g}"


def _is_sgd(history: History) -> bool:
    """Return whether updates are proportional to the gradient."""
    name = (history.facts.optimizer or "").lower()
    return "sgd" in name and "sign" not in name


def _is_muon(history: History) -> bool:
    return "muon" in (history.facts.optimizer or "").lower()


def _has_trainable_blocks(history: History, sample: Sample) -> bool:
    pairs = zip(history.facts.groups, values_of(sample, "update_ratio"), strict=False)
    return any(ratio is not None and name in history.facts.blocks for name, ratio in pairs)


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
