"""layer-jump: one layer changed abruptly from one sample to the next, and the others did not.

Signals: RMS of a group's weights and the largest gain of a norm; then a block's branch, attention and feed-forward
ratios and its stream. Threshold: at least 5 times both the previous sample and the median of up to 8 samples before
that, while the median layer changes less than 2-fold; what grew k-fold between the two samples before, as branches
do in the first steps, has to grow 5 k-fold. [ours] Training cannot do this to weights, so it is an immediate
"fail". It can do it to activations, especially in the first steps, so a jump of less than 20-fold counts only if the
loss is at least 5 % higher than before, and is a warning, as is a larger one without that; both together are a "fail",
unless updates above 5 % of the weights are the cause. If the layer's own updates
since the previous sample can add up to half of its weights or more (Adam with a small β₂), the alarm says so.
Persistence for activations: 2 samples. If weights jumped, they are the cause and activations are not reported.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule, layer_names
from omninorm.monitor.rules.numbers import earlier, finite, fold, known, median, value_at, values_of
from omninorm.record.alarm import Alarm

JUMP, HUGE, OTHERS = 5.0, 20.0, 2.0
OWN = 0.5  # updates per step × steps per sample; from here on the optimizer itself can move a layer this far
LARGE = 0.05  # share of the weights; after the first steps no healthy update is this large
WORSE, BEFORE, AFTER = 0.05, 10, 5  # of the loss: the relative rise, and the number of steps averaged before and after
SAMPLES, FEWEST = 8, 3
WEIGHTS = ("weight_rms", "gain_max")
ACTIVATIONS = ("branch_ratio", "attention_ratio", "feed_forward_ratio", "stream_rms")
_TITLES = {
    "weight_rms": "RMS of the weights",
    "gain_max": "largest gain",
    "branch_ratio": "block's contribution relative to the residual stream",
    "attention_ratio": "attention's contribution relative to the residual stream",
    "feed_forward_ratio": "feed-forward's contribution relative to the residual stream",
    "stream_rms": "RMS of the residual stream",
}


def _cause(signal: str) -> str:
    return "Weights" if signal in WEIGHTS else "Activations"


class LayerJump(Rule):
    """Reports the layer, for as long as its signal stays at the higher level."""

    name = "layer-jump"
    source = "the thresholds, 5-fold and 20-fold, are omninorm's own; see docs/watching.md"
    explains = (
        *LOSS_ALARMS,
        "learning-rate",
        "depth-growth",
        "attention-logits",
        "attention-entropy",
        "massive-activation",
        "branch-silent",
        "adam-eps",
        "odd-block",
        "gradient-clipped",
        "logz",
        "nonfinite",
        "stream-growth",
    )

    def __init__(self) -> None:
        self._before: dict[tuple[str, int], tuple[float, int]] = {}  # the level before a jump, and the step of the jump

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        for signals in (WEIGHTS, ACTIVATIONS[:-1], ACTIVATIONS[-1:]):
            found = [
                found
                for signal in signals
                for found in self._jumps(history, sample, signal)
                if self._counts(history, *found)
            ]
            if not found:
                continue
            if signals == ACTIVATIONS[-1:]:  # later blocks inherit a jump of the stream: the first block is the cause
                yield self._explain(history, sample, *min(found, key=lambda jump: jump[2]))
                return
            reported: set[str | None] = set()
            for factor, signal, index in sorted(found, reverse=True):
                layer = layer_names(history.facts, signal)[index]
                if layer not in reported:  # the jump of a part is also its block's jump
                    yield self._explain(history, sample, factor, signal, index)
                reported.add(layer)
            return

    def _counts(self, history: History, factor: float, signal: str, index: int) -> bool:
        """Return whether a jump is reported: not a small one of activations that did no harm."""
        return signal in WEIGHTS or factor >= HUGE or bool(_loss_rise(history, self._before[signal, index][1]))

    def _jumps(self, history: History, sample: Sample, signal: str) -> list[tuple[float, str, int]]:
        """Return (ratio, signal, index) of the layers that are at a higher level at this sample."""
        values = values_of(sample, signal)
        new = self._new_jumps(history, signal, values)
        found = []
        for index, value in enumerate(values):
            key = signal, index
            if key in new and key not in self._before:
                self._before[key] = new[key], sample.step
            if key not in self._before or value is None:
                continue
            height, since = self._before[key]
            if value < JUMP * height:
                del self._before[key]
            elif signal in WEIGHTS or since < sample.step:
                found.append((value / height, signal, index))
        return found

    def _new_jumps(self, history: History, signal: str, values: list[float | None]) -> dict[tuple[str, int], float]:
        if len(history.samples) <= FEWEST:
            return {}
        before, earlier_still = (values_of(history.samples[at], signal) for at in (-2, -3))
        ratios = _ratios(values, before)
        if not ratios or max(ratios.values()) < JUMP or median(list(ratios.values())) >= OTHERS:
            return {}
        jumps, growth = dict[tuple[str, int], float](), _ratios(before, earlier_still)
        for index, ratio in ratios.items():
            abrupt = ratio >= JUMP * max(1.0, growth.get(index, 1.0))
            past = earlier(history, signal, index, SAMPLES) if abrupt else []
            value = values[index]
            if len(past) >= FEWEST and value is not None and 0.0 < JUMP * median(past) <= value:
                jumps[signal, index] = median(past)
        return jumps

    def _explain(self, history: History, sample: Sample, factor: float, signal: str, index: int) -> Alarm:
        height, step = self._before[signal, index]
        layer = layer_names(history.facts, signal)[index]
        evidence = (
            f"{_cause(signal)} jumped in {layer}: the {_TITLES[signal]} rose {fold(factor)} by step {step}, "
            f"from {height:.3g} to {height * factor:.3g}, while the other layers hardly changed."
        )
        if signal in WEIGHTS:
            remedy = (
                "Training alone does not do this. Look for code that writes to these weights, or restore a checkpoint."
            )
            update = _own_update(history, step, signal, index)
            if update * history.facts.every >= OWN:
                evidence += f" The optimizer's own updates changed its matrices by up to {100 * update:.2g} % per step."
                remedy = (
                    "Lower the learning rate, or raise Adam's β₂ if it is below 0.9. Otherwise, look for code that "
                )
                remedy += "writes to these weights."
            return self.alarm(sample.step, "fail", layer, evidence, remedy)
        remedy = (
            f"Run {layer} on the same input with the weights of a checkpoint from before step {step}. If its output is "
            "as large, look at the input and the code (scales, masks, norms); if not, lower its learning rate."
        )
        update = _largest_update(history, step)
        if update > LARGE:  # then the weights did change, and the learning rate is the cause
            evidence += f" Updates changed the weights by up to {100 * update:.2g} % per step."
            remedy = "Lower the learning rate and use a warm-up."
        worse = _loss_rise(history, step) if factor >= HUGE and update <= LARGE else None
        if worse:
            return self.alarm(sample.step, "fail", layer, f"{evidence} The loss rose {worse}.", remedy)
        return self.alarm(sample.step, "warn", layer, evidence, remedy)


def _ratios(now: list[float | None], then: list[float | None]) -> dict[int, float]:
    """Return now/then by index, where both are known and then > 0."""
    pairs = enumerate(zip(now, then, strict=False))
    return {index: new / old for index, (new, old) in pairs if new is not None and old and old > 0.0}


def _largest_update(history: History, jump: int) -> float:
    """Return the largest median update since the sample before the jump; 0 if none is known."""
    samples = [sample for sample in history.samples if sample.step >= jump - history.facts.every]
    ratios = [known(values_of(sample, "update_ratio")) for sample in samples]
    return max((median(found) for found in ratios if found), default=0.0)


def _own_update(history: History, jump: int, signal: str, index: int) -> float:
    """Return the largest update of the layer's group, relative to its weights, since the sample before the jump."""
    facts = history.facts
    name = layer_names(facts, signal)[index]
    if signal == "gain_max":
        block = facts.norms[index].block
        name = facts.blocks[block] if block is not None and block < len(facts.blocks) else name
    if name not in facts.groups:
        return 0.0
    at = facts.groups.index(name)
    samples = [sample for sample in history.samples if sample.step >= jump - facts.every]
    return max((value_at(sample, "update_ratio", at) or 0.0 for sample in samples), default=0.0)


def _loss_rise(history: History, jump: int) -> str | None:
    """Describe the rise of the loss from its mean before the jump to its newest mean; None if it did not rise."""
    before = jump - history.facts.every  # the jump may have happened right after the previous sample
    steps = list(history.steps)
    past = known(finite(step.loss) for step in steps if step.step <= before)[-BEFORE:]
    newest = known(finite(step.loss) for step in steps if step.step >= jump)[-AFTER:]
    if not past or not newest:
        return None
    old, new = sum(past) / len(past), sum(newest) / len(newest)
    return f"from {old:.4g} to {new:.4g}" if new - old >= WORSE * abs(old) else None
