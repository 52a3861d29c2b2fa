"""headroom: activations come near the end of fp16's range.

Signal: max |x| of each block's output as a share of 65504, in a run whose activations are fp16. Threshold: 0.1 is a
warning, as the next spike may end in infinity; 1 a "fail" [ours]. Persistence: none.
"""

from __future__ import annotations

from omninorm.watch.history import History, Sample
from omninorm.watch.rules.base import Threshold

LARGEST = 65504.0


class Headroom(Threshold):
    """Silent unless the facts say that the run computes in fp16."""

    name = "headroom"
    source = "fp16 ends at 65504; to warn at a tenth of it is omninorm's own"
    signal = "stream_max"
    warn = 0.1 * LARGEST
    fail = LARGEST * (1 - 1e-3)

    def applies(self, history: History, sample: Sample, index: int, value: float) -> bool:
        return history.dtype == "float16"

    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        block = history.facts.blocks[index]
        evidence = f"The largest activation in {block}'s output is {value:.3g}; fp16 ends at 65504."
        return evidence, "Run in bf16, or keep the residual stream in fp32."
