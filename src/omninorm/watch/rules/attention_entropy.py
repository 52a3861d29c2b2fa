"""attention-entropy: a block's heads look at single tokens.

Signal: the entropy of the attention as a share of the largest possible, mean over heads. Threshold: below 0.03 [ours].
0.1 cries wolf: healthy byte-level Thinkers, in which a head that reads the character before is a good one, came down
to 0.06 within 400 steps at three times their ordinary rate; at 30 times it the first blocks fell below 0.03 within 40.
Persistence: 3 samples over 20 steps. A warning.
"""

from __future__ import annotations

from omninorm.watch.history import History, Sample
from omninorm.watch.rules.base import Threshold


class AttentionEntropy(Threshold):
    """Low entropy is where growing logits end."""

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
            f"The attention of {block} has {value:.2g} of the entropy it could have: its heads see single tokens."
        )
        return evidence, "Use qk-norm, or a lower learning rate on the query and key projections."
