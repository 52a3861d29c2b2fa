"""residual-missing: a block returns its branches without its input.

Signals: the angle between a block's input x and output y, as a share of 180°, and y's component along x, ⟨x, y⟩ / ⟨x,
x⟩, from the RMS of both and of their difference. Threshold: an angle of 0.35 to 0.65 while the median of the other
blocks is below half of it and 0.25, and a component below 0.5. [ours] Branches are nearly orthogonal to the stream:
with a residual connection the component is 1, also if the branch is large, and without it 0. The first block's input is
small and the last one writes for the head, so neither is judged. Of three blocks, the last one counts as the other, and
the output must not be larger than 5 times the input: next to a huge branch the component is noise. Persistence: 3
samples over 20 steps.

At the first sample the autograd graph is read as well. A block is reported at once, whatever its place, if its input
reaches its output only through matrix products, while most of the other blocks of its stack add theirs. It must have
attention, or the same matrices as another block: plain layers between residual blocks are legitimate. If no block's
output is a sum with its input, and all angles are as above, the whole stack is reported at once, if every block has
attention. Compiled blocks, and blocks under reentrant checkpointing, have no such graph.
All are warnings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.history import Facts, History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks, known, median, value_at, values_of
from omninorm.record.alarm import Alarm

LOW, HIGH = 0.35, 0.65
OTHERS, SHARE = 0.25, 0.5
COMPONENT = 0.5
FEWEST, HUGE = 3, 5.0
SAMPLES, STEPS = 3, 20


class ResidualMissing(Rule):
    """Reports the block, or the whole model."""

    name = "residual-missing"
    source = "the thresholds, an angle of 0.35 to 0.65 and a component of 0.5, are omninorm's own; see docs/watching.md"
    explains = ("gradient-jump", "odd-block", "depth-growth")
    structural = True

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._everywhere = False

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        angles = values_of(sample, "angle")
        if len(history.samples) == 1:
            self._everywhere = _is_everywhere(history, angles)
        if self._everywhere:
            evidence = f"No residual connection in {len(history.facts.blocks)} blocks: none adds its input to "
            evidence += "what it returns."
            yield self.alarm(sample.step, "warn", None, evidence, "Return x + branch(x) from each block.")
            return
        for block in history.without_input:
            yield self._explain_exact(sample.step, history.facts, block)
        for chain in history.facts.chains or [range(len(history.facts.blocks))]:
            for place in range(1, len(chain) - 1):
                siblings = chain[1:-1] if len(chain) > FEWEST else chain[1:]
                others = known(angles[at] for at in siblings if at != chain[place] and at < len(angles))
                block, before = chain[place], chain[place - 1]
                holds = _turns(sample, angles, block, others) and _drops(sample, before, block)
                holds = holds and (len(chain) > FEWEST or not _is_huge(sample, before, block))
                angle = angles[block] if block < len(angles) else None
                lasts = self._streaks.lasts(block, holds, sample.step, SAMPLES, STEPS)
                if lasts and angle is not None and block not in history.without_input:
                    yield self._explain(sample, history.facts.blocks[block], angle, median(others))

    def _explain_exact(self, step: int, facts: Facts, block: int) -> Alarm:
        name = facts.blocks[block]
        evidence = f"Residual connection missing: {name} does not add its input to what it returns, but most of the "
        evidence += "other blocks do."
        return self.alarm(step, "warn", name, evidence, _remedy(name))

    def _explain(self, sample: Sample, block: str, angle: float, typical: float) -> Alarm:
        evidence = f"Residual connection missing: {block} turns the residual stream by {180 * angle:.0f}° and keeps "
        evidence += f"almost nothing of its input; the median of the other blocks is {180 * typical:.0f}°."
        return self.alarm(sample.step, "warn", block, evidence, _remedy(block))


def _remedy(block: str) -> str:
    return f"Check that {block} adds its input to its branches: x + branch(x)."


def _is_everywhere(history: History, angles: Sequence[float | None]) -> bool:
    attentions = history.facts.attentions
    if not history.no_residual or not attentions or None in attentions or len(angles) != len(attentions):
        return False
    return all(angle is not None and LOW <= angle <= HIGH for angle in angles)


def _turns(sample: Sample, angles: Sequence[float | None], block: int, others: Sequence[float]) -> bool:
    """Return whether the block's output is nearly orthogonal to its input, unlike those of the others."""
    angle = angles[block] if block < len(angles) else None
    if angle is None or not others or not LOW <= angle <= HIGH:
        return False
    return median(others) < min(SHARE * angle, OTHERS)


def _drops(sample: Sample, before: int, block: int) -> bool:
    """Return whether the output's component along the input, ⟨x, y⟩ / ⟨x, x⟩, is small."""
    x, y = value_at(sample, "stream_rms", before), value_at(sample, "stream_rms", block)
    change = value_at(sample, "branch_ratio", block)
    if x is None or y is None or change is None or x <= 0.0:
        return False
    return abs(1.0 + (y / x) ** 2 - change**2) / 2.0 < COMPONENT


def _is_huge(sample: Sample, before: int, block: int) -> bool:
    x, y = value_at(sample, "stream_rms", before), value_at(sample, "stream_rms", block)
    return x is None or y is None or y > HUGE * x
