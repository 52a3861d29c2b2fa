"""eps-share: a norm's ε, not its input, sets the scale of its output.

Signal: ε/(mean(x²) + ε). The norm's output has RMS γ·√(1 − share): at 50 % it is 30 % too small, at 90 % it is a third.
Threshold: above 50 % is suspicious, above 90 % severe. [ours] Both depend on what the norm reads:
- The residual stream (a norm outside the blocks, or one whose input is at least half as large as its block's): all that
  the layers after it see is too small. Severe for 3 samples over 20 steps is a "fail"; suspicious for 5 samples over
  50 steps, without the input having doubled meanwhile, is a warning.
- Anything else, such as the output of a branch: it starts near 0 by design and grows. Healthy OLMo-2 (widths 64 and
  256) and Qwen3-Next begin with shares of 92 to 100 % there, and some stay above 70 % for 150 steps while the loss
  falls. There is no alarm.
- Any norm whose ε itself is unusual: above 1e-3, or 100 times the median ε of the model's norms. Severe for 2 samples
  over 4 steps, or suspicious for 3 samples over 20 steps without the input having doubled, is a "fail".
Persistence: as given above.
If the structure of the model is unknown, the alarm is never more than a warning, and needs an unusual ε.
Ordinary initializations are far below 50 %: embeddings of std 0.02 with ε = 1e-5 begin at 2.4 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.history import Facts, History, Sample
from omninorm.monitor.rules.base import EXTREME_SPAN, Rule
from omninorm.monitor.rules.numbers import Streaks, median, value_at, values_of
from omninorm.record.alarm import Alarm
from omninorm.record.signals import Limit

HALF, SEVERE = 0.5, 0.9
SAMPLES, STEPS = 3, 20
FEW_SAMPLES, FEW_STEPS = 2, EXTREME_SPAN  # for a severe share and an unusual ε
LONG_SAMPLES, LONG_STEPS = 5, 50
GROWN = 2.0  # growth of mean(x²) since the share exceeded 50 %, after which the share counts as falling
LARGE, UNUSUAL = 1e-3, 100.0  # ε, and its ratio to the median ε
PART = 0.5  # of the block's input; the input of a norm on the residual stream is at least as large


class EpsShare(Rule):
    """Reports the norm and its ε."""

    name = "eps-share"
    source = "the thresholds of 50 and 90 % are omninorm's own; see docs/watching.md"
    explains = ("depth-growth", "branch-silent", "adam-eps", "adam-underestimation", "no-progress", "dead-units")
    most_layers = 1  # ε is usually one setting for all norms, so one alarm about the worst is enough

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._first: dict[int, float] = {}  # mean(x²)/ε when the share exceeded 50 %

    def limits(self) -> Sequence[Limit]:
        return (Limit("eps_share", self.name, HALF, SEVERE, condition="on the residual stream, or with an unusual ε"),)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        found: list[tuple[bool, float, int]] = []
        for index, share in enumerate(values_of(sample, "eps_share")):
            if share is None or index >= len(history.facts.norms):
                continue
            unusual = _is_unusual(history.facts, index)
            severe, suspicious = self._lasting(index, share, sample.step, unusual)
            if unusual and (severe or suspicious):
                found.append((bool(history.facts.blocks), share, index))
            elif (severe or suspicious) and _reads_stream(history.facts, sample, index):
                found.append((severe, share, index))
        for failed, share, index in sorted(found, key=lambda item: item[:2], reverse=True):
            yield self._explain(history.facts, sample, index, share, failed)

    def _lasting(self, index: int, share: float, step: int, unusual: bool) -> tuple[bool, bool]:
        """Return whether the share has been above 90 % for long enough, and above 50 % without falling."""
        few, many = ((FEW_SAMPLES, FEW_STEPS), (SAMPLES, STEPS)), ((SAMPLES, STEPS), (LONG_SAMPLES, LONG_STEPS))
        for_severe, for_suspicious = few if unusual else many
        severe = self._streaks.lasts((index, "severe"), share > SEVERE, step, *for_severe)
        lasting = self._streaks.lasts(index, share > HALF, step, *for_suspicious)
        if share <= HALF:
            self._first.pop(index, None)
            return severe, False
        size = 1.0 / share - 1.0
        first = self._first.setdefault(index, size)
        return severe, lasting and (size < GROWN * first or size == 0.0)

    def _explain(self, facts: Facts, sample: Sample, index: int, share: float, failed: bool) -> Alarm:
        norm = facts.norms[index]
        eps = "ε" if norm.eps is None else f"ε = {norm.eps:g}"
        evidence = (
            f"Norm's ε too large: in {norm.name}, {eps} makes up {100 * share:.3g} % of mean(x²) + ε, so its output is "
            f"only {max(1.0 - share, 0.0) ** 0.5:.2g} of its normal size."
        )
        size = 0.0 if norm.eps is None else norm.eps * (1.0 / share - 1.0)
        remedy = "Find out why the norm's input is so small. For inputs of this size, use ε = 1e-6 or less."
        if size > 0.0 and not _is_unusual(facts, index):
            remedy = f"Find out why the norm's input is so small: its mean(x²) is {size:.2g}. If this is intended, "
            remedy += f"use a smaller ε, such as {min(1e-6, 1e-3 * size):.0e}."
        elif size > 0.0:
            remedy = f"Use a smaller ε, such as {min(1e-6, 1e-3 * size):.0e}: mean(x²) of its input is {size:.2g}."
        return self.alarm(sample.step, "fail" if failed else "warn", norm.name, evidence, remedy)


def _is_unusual(facts: Facts, index: int) -> bool:
    eps, known = facts.norms[index].eps, [norm.eps for norm in facts.norms if norm.eps]
    return eps is not None and (eps > LARGE or (bool(known) and eps >= UNUSUAL * median(known)))


def _reads_stream(facts: Facts, sample: Sample, index: int) -> bool:
    """Return whether the norm's input is about as large as its block's, or the norm is outside the blocks."""
    block = facts.norms[index].block
    if not facts.blocks or block is None:
        return bool(facts.blocks)
    size = value_at(sample, "norm_rms", index)
    if block > 0:
        stream = value_at(sample, "stream_rms", block - 1)
    else:  # |x| ≥ |y|/(1 + |y − x|/|x|)
        ratio, after = value_at(sample, "branch_ratio", 0), value_at(sample, "stream_rms", 0)
        stream = None if after is None else after / (1.0 + (ratio or 0.0))
    return size is not None and stream is not None and size >= PART * stream
