"""headroom: activations approach the largest fp16 number.

Signal: max |x| of each block's output as a share of 65504, in a run whose activations are fp16. Threshold: 0.1 is a
warning, because the next spike may overflow; 1 is a "fail" [ours]. Persistence: none.
"""

from __future__ import annotations

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Threshold

LARGEST = 65504.0


class Headroom(Threshold):
    """Reports the block. Inactive unless the run computes in fp16."""

    name = "headroom"
    source = "the largest fp16 number is 65504; warning at a tenth of it is omninorm's own"
    explains = ("nonfinite",)
    signal = "stream_max"
    warn = 0.1 * LARGEST
    fail = LARGEST * (1 - 1e-3)
    dtype = "float16"

    def applies(self, history: History, sample: Sample, index: int, value: float) -> bool:
        return history.dtype == self.dtype

    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        block = history.facts.blocks[index]
        evidence = f"The largest activation in the output of {block} is {value:.3g}; the largest fp16 number is 65504."
        return evidence, "Run in bf16, or keep the residual stream in fp32."
