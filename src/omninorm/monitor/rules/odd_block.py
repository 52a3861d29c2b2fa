"""odd-block: one block differs from all others by an order of magnitude.

Signals: attention entropy and logits; branch, attention and feed-forward ratios; gradient of the stream's weights
(‖∂loss/∂w‖) and update ratio; RMS of the weights and the largest gain of its norms. Threshold, on the logarithms among
the blocks: at least 10 times the median of the blocks or a tenth of it (weights and gains: 5 times, because siblings
begin alike; entropy: a quarter), and 6 times as far from it as the median block. [ours] At least 4 blocks are needed;
the weights of 3 are compared as well, if these blocks have the same class and the same matrices. The first and the last
block legitimately differ (the first reads a small embedding, the last writes for the head): they are judged by their
weights and gains only, and do not count for the others' spread. With fewer than 4 blocks between them, the spread says
little; then a block other than the first that writes 15 times its input, and 10 times as much as the blocks after the
first on average (median), is reported as well; of 3 such blocks, only the second. Logits count only if they are too
large. Persistence: 3 samples over 20 steps. It is a warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from omninorm.monitor.history import Facts, History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, factor, known, values_of
from omninorm.record.alarm import Alarm

ORDER, SIZE_ORDER, ENTROPY_ORDER, SPREADS = 10.0, 5.0, 4.0, 6.0
FEWEST, FEWEST_ALIKE = 4, 3
OVERWRITES = 15.0  # times its input
SAMPLES, STEPS = 3, 20
# In the order of causes: the weights, then what they do.
SIZES = ("weight_rms", "gain_max")
WEIGHTS = ("weight_rms", "gain_max", "update_ratio", "grad_norm")
ATTENTION = ("attention_entropy", "attention_logit")
BRANCHES = ("attention_ratio", "feed_forward_ratio", "branch_ratio")
_TITLES = {
    "weight_rms": "RMS of the weights",
    "gain_max": "largest gain of the norms",
    "update_ratio": "update per step relative to the weights",
    "grad_norm": "gradient norm",
    "attention_entropy": "attention entropy",
    "attention_logit": "largest attention logit",
    "attention_ratio": "attention's contribution relative to the residual stream",
    "feed_forward_ratio": "feed-forward's contribution relative to the residual stream",
    "branch_ratio": "contribution relative to the residual stream",
}


_HARMFUL = {"attention_entropy": -1.0, "attention_logit": 1.0}  # the direction that counts, where only one does


class Odd(NamedTuple):
    """A block whose signal is far from that of the median block."""

    block: int
    signal: str
    value: float
    typical: float

    @property
    def distance(self) -> float:
        return abs(math.log(self.value / self.typical))


class OddBlock(Rule):
    """Reports the block, with the signal in which it differs; a cause in the weights first."""

    name = "odd-block"
    source = (
        "the thresholds, 10-fold (weights and gains 5-fold, entropy 4-fold) and 6 times the median deviation, are "
        "omninorm's own; see docs/watching.md"
    )
    explains = ("attention-entropy", "attention-logits", "dead-units", "depth-growth", "massive-activation")

    def __init__(self) -> None:
        self._streaks = Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        count = len(history.facts.blocks)
        if count < FEWEST_ALIKE:
            return
        lasting: dict[int, Odd] = {}
        for signal in (*WEIGHTS, *ATTENTION, *BRANCHES):
            values = _by_block(history, sample, signal)
            odd = {found.block: found for found in _odd_in_chains(values, signal, history.facts)}
            if not odd and not self._streaks.running():
                continue
            for block in range(count):
                holds = block in odd
                if self._streaks.lasts((signal, block), holds, sample.step, SAMPLES, STEPS):
                    lasting.setdefault(block, odd[block])
        for found in sorted(lasting.values(), key=lambda found: found.distance, reverse=True):
            yield self._explain(history, sample, found)

    def _explain(self, history: History, sample: Sample, found: Odd) -> Alarm:
        block = history.facts.blocks[found.block]
        ratio = math.exp(found.distance)
        way = "times" if found.value > found.typical else "times smaller than"
        comparison = f"{factor(ratio)} {way} that of the median block ({found.typical:.3g})"
        evidence = (
            f"Block unlike the others: the {_TITLES[found.signal]} of {block} is {found.value:.3g}, {comparison}."
        )
        remedy = f"Compare the initialization and the optimizer settings of {block} with those of the other blocks."
        if all(
            odd.block != found.block
            for odd in _odd_ones(_by_block(history, history.samples[0], found.signal), found.signal)
        ):
            evidence += f" It was like the others at step {history.samples[0].step}."
            remedy = (
                f"Look at what changes {block}: a higher learning rate, a small β₂ of Adam, or code that writes to it."
            )
        if found.signal in ATTENTION:
            remedy += " If only its attention differs, check its query and key weights, and consider qk-norm."
        return self.alarm(sample.step, "warn", block, evidence, remedy)


def _by_block(history: History, sample: Sample, signal: str) -> list[float | None]:
    """Return one positive value per block; None where it is unknown."""
    facts, values = history.facts, values_of(sample, signal)
    if signal == "gain_max":
        largest: dict[int | None, float] = {}
        for norm, value in zip(facts.norms, values, strict=False):
            if value is not None:
                largest[norm.block] = max(value, largest.get(norm.block, value))
        values = [largest.get(index) for index in range(len(facts.blocks))]
    elif signal in WEIGHTS:
        named = dict(zip(facts.groups, values, strict=False))
        values = [named.get(block) for block in facts.blocks]
    found = [value if value is not None and value > 0.0 else None for value in values]
    return found[: len(facts.blocks)] + [None] * (len(facts.blocks) - len(found))


def _odd_in_chains(values: list[float | None], signal: str, facts: Facts) -> Iterable[Odd]:
    """Yield the odd blocks, compared with those of their own stage, encoder, decoder or tower."""
    for chain in facts.chains or [range(len(values))]:
        if len(chain) < FEWEST and not _are_alike(facts, chain):
            continue
        for found in _odd_ones([values[at] for at in chain], signal):
            yield found._replace(block=chain[found.block])


def _are_alike(facts: Facts, blocks: Sequence[int]) -> bool:
    return len({facts.alike[at] if at < len(facts.alike) else -1 - at for at in blocks}) == 1


def _odd_ones(values: list[float | None], signal: str) -> list[Odd]:
    inner = sorted(math.log(value) for value in values[1:-1] if value is not None)
    everyone = sorted(math.log(value) for value in known(values))
    if len(everyone) < FEWEST:
        return _odd_of_few(values, signal) if len(everyone) == FEWEST_ALIKE == len(values) else []
    middle = _middle(everyone)
    spread = _middle(sorted(abs(value - middle) for value in (inner if len(inner) >= FEWEST else everyone)))
    limit = ENTROPY_ORDER if signal == "attention_entropy" else SIZE_ORDER if signal in SIZES else ORDER
    odd = []
    for block, value in enumerate(values):
        if value is None or (block in (0, len(values) - 1) and signal not in SIZES):
            continue
        distance = math.log(value) - middle
        if distance * _HARMFUL.get(signal, distance) < 0.0:
            continue
        if abs(distance) >= max(math.log(limit), SPREADS * spread):
            odd.append(Odd(block, signal, value, math.exp(middle)))
        elif signal == "branch_ratio" and len(inner) < FEWEST:
            odd += _overwriting(values, block, value)
    return odd


def _odd_of_few(values: list[float | None], signal: str) -> list[Odd]:
    """Return the odd block of three: by its weights, while the others agree, or as one that overwrites its input."""
    first, second, third = known(values)
    if signal == "branch_ratio":
        overwrites = second >= max(OVERWRITES, ORDER * third)
        return [Odd(1, signal, second, third)] if overwrites else []
    low, middle, high = sorted((first, second, third))
    near, far = sorted((middle / low, high / middle))
    if signal != "weight_rms" or far < SIZE_ORDER or math.log(far) < SPREADS * math.log(near):
        return []
    value = high if far == high / middle else low
    return [Odd(values.index(value), signal, value, middle)]


def _overwriting(values: list[float | None], block: int, value: float) -> list[Odd]:
    """Return the block if it writes far more than its input, and than the blocks after the first."""
    others = sorted(math.log(other) for at, other in enumerate(values) if at not in (0, block) and other is not None)
    if len(others) < 2 or value < max(OVERWRITES, ORDER * math.exp(_middle(others))):
        return []
    return [Odd(block, "branch_ratio", value, math.exp(_middle(others)))]


def _middle(ordered: list[float]) -> float:
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
