"""attention-entropy: a block's heads attend to single tokens.

Signal: the attention entropy as a share of its maximum, mean over heads. Threshold: below 0.03 [ours]. 0.1 gives false
alarms: healthy byte-level Thinkers, where a head that reads the previous character is useful, went down to 0.06 within
400 steps at three times their usual learning rate. At 30 times it, the first blocks fell below 0.03 within 40 steps.
Persistence: 3 samples over 20 steps. It is a warning.
"""

from __future__ import annotations

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Threshold


class AttentionEntropy(Threshold):
    """Reports the block. Low entropy is the final state of growing logits."""

    name = "attention-entropy"
    source = "entropy collapse is described by Zhai et al., arXiv 2303.06296; the threshold of 0.03 is omninorm's own"
    signal = "attention_entropy"
    warn = 0.03
    below = True
    persistence = 3
    span = 20

    def explain(self, history: History, sample: Sample, index: int, value: float) -> tuple[str, str]:
        block = history.facts.blocks[index]
        evidence = (
            f"The attention entropy of {block} is {value:.2g} of its maximum, so its heads attend to single tokens."
        )
        return evidence, "Use qk-norm, or a lower learning rate for the query and key projections."
