"""massive-activation: single elements of the residual stream are thousands of times larger than the typical ones.

Signal: max |x| and median |x| of each block's output. Threshold: above 100 and above 1000 times the median.
Persistence: 3 samples over 20 steps. It is a warning: large pretrained models work with them, but they hurt low
precision and quantization.
Source: Sun et al., Massive Activations in Large Language Models.
"""

from __future__ import annotations

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Threshold
from omninorm.monitor.rules.numbers import value_at

TIMES = 1000.0


class MassiveActivation(Threshold):
    """Reports the block, where both stream_max and stream_median are known."""

    name = "massive-activation"
    source = "the thresholds, 100 and 1000 times the median, are from Sun et al., arXiv 2402.17762"
    signal = "stream_max"
    warn = 100.0
    persistence = 3
    span = 20
    condition = f"and {TIMES:,.0f} times the median"

    def applies(self, history: History, sample: Sample, index: int, value: float) -> bool:
        middle = value_at(sample, "stream_median", index)
        return middle is not None and value > TIMES * middle

    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        block, middle = history.facts.blocks[index], value_at(sample, "stream_median", index) or 0.0
        evidence = f"The largest activation in the output of {block} is {value:.3g}, while the median is {middle:.2g}."
        return (
            evidence,
            "Expect problems in fp16 and when quantizing. Gated attention or an attention-sink token avoids them.",
        )
