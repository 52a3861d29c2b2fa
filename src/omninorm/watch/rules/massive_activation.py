"""massive-activation: single numbers of the residual stream are thousands of times its ordinary ones.

Signal: max |x| and median |x| of each block's output. Threshold: above 100 and above 1000 times the median.
Persistence: 3 samples over 20 steps. A warning: large pretrained models work with them, but low precision and
quantization suffer.
Source: Sun et al., Massive Activations in Large Language Models.
"""

from __future__ import annotations

from omninorm.watch.history import History, Sample
from omninorm.watch.rules.base import Threshold
from omninorm.watch.rules.numbers import value_at

TIMES = 1000.0


class MassiveActivation(Threshold):
    """Judges stream_max where stream_median is known, too."""

    name = "massive-activation"
    source = "the thresholds, 100 and 1000 times the median, are from Sun et al., arXiv 2402.17762"
    signal = "stream_max"
    warn = 100.0
    persistence = 3
    span = 20

    def applies(self, history: History, sample: Sample, index: int, value: float) -> bool:
        middle = value_at(sample, "stream_median", index)
        return middle is not None and value > TIMES * middle

    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        block, middle = history.facts.blocks[index], value_at(sample, "stream_median", index) or 0.0
        evidence = f"The largest activation in {block}'s output is {value:.3g}, where the median is {middle:.2g}."
        return evidence, "Expect trouble in fp16 and in quantization; gated attention or a token to attend to avoid it."
